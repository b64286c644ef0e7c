//! The messages on the administrators' socket, for both sides.

pub(in crate::admin) mod baselines;
mod command;
pub(in crate::admin) mod export;
mod secret;
pub(in crate::admin) mod signers;

pub use self::baselines::{Checked, Compared, Differs, MeasuredEvent, Pcrs, PolicyShown, Shown as ShownBaseline};
pub use self::command::Command;
pub use self::export::Document;
pub use self::secret::Secret;
pub use self::signers::{Revoked, Rotated, Shown, Standing};
