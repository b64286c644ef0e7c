//! The administrators' socket and the handlers of its commands.

mod client;
mod error;
pub(crate) mod handlers;
mod line;
mod message;
mod socket;

pub use self::client::{ANSWER_LIMIT, call};
pub use self::error::{AdminError, check_length};
pub use self::message::{
    Checked, Command, Compared, Differs, Document, MeasuredEvent, Pcrs, PolicyShown, Revoked, Rotated, Secret, Shown,
    ShownBaseline, Standing,
};
pub(crate) use self::socket::lock_file;
pub use self::socket::{AdminSocket, REQUEST_LIMIT, REVIEW_LIMIT};
