//! Results as pages: one file each, pictures inside, nothing loaded from elsewhere, light and dark.

mod capacity;
mod compare;
mod page;
mod picture;
mod plan;
mod run;

pub use capacity::page as capacity;
pub use compare::page as compare;
pub use plan::page as plan;
pub use run::page as run;
