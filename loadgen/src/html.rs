//! Writes results as HTML pages. Each page is one file with its pictures inside. It loads nothing from elsewhere, and
//! supports light and dark mode.

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
