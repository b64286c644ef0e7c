//! What administrators ask of a running daemon: the socket, and what is done for each command.

pub mod handlers;
mod message;
mod socket;

pub use self::message::{
    Checked, Command, Compared, Differs, Document, MeasuredEvent, Pcrs, PolicyShown, Revoked, Rotated, Secret, Shown,
    ShownBaseline, Standing,
};
pub(crate) use self::socket::lock_file;
pub use self::socket::{ANSWER_LIMIT, AdminError, AdminSocket, REQUEST_LIMIT, REVIEW_LIMIT, call, check_length};
