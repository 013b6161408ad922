//! What control answers when it does not do what was asked: one stable reason and what to do, the same over
//! gRPC, over the operator API, in the log and in the audit.

use mesh_core::reason::Reason;

/// The header and gRPC metadata key that carries the reason's code.
pub(crate) const REASON_HEADER: &str = "x-meshwork-reason";

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Refusal {
    pub reason: Reason,
    pub message: String,
}

impl Refusal {
    pub(crate) fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
        }
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(Reason::Invalid, message)
    }

    pub(crate) fn not_found(what: &str) -> Self {
        Self::new(Reason::NotFound, format!("there is no {what}"))
    }

    /// The server's own fault; what it was is for the log only.
    pub(crate) fn internal() -> Self {
        Reason::Internal.into()
    }
}

impl From<Reason> for Refusal {
    fn from(reason: Reason) -> Self {
        Self::new(reason, reason.text())
    }
}

impl From<Refusal> for tonic::Status {
    fn from(refusal: Refusal) -> Self {
        let code = match refusal.reason.http_status() {
            400 => tonic::Code::InvalidArgument,
            401 => tonic::Code::Unauthenticated,
            403 => tonic::Code::PermissionDenied,
            404 => tonic::Code::NotFound,
            409 => tonic::Code::AlreadyExists,
            429 => tonic::Code::ResourceExhausted,
            503 => tonic::Code::Unavailable,
            504 => tonic::Code::DeadlineExceeded,
            _ => tonic::Code::Internal,
        };
        let mut status = Self::new(code, refusal.message);
        if let Ok(value) = refusal.reason.code().parse() {
            status.metadata_mut().insert(REASON_HEADER, value);
        }
        status
    }
}
