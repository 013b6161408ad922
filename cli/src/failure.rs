//! Errors: the operation, the object, whose fault it is, and what to do. The exit code tells scripts the same.

use std::fmt;
use std::process::ExitCode;

/// Whose fault a failure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// Control said no. Exit code 1.
    Refused,
    /// What was typed, or a file that was named, or this machine. Exit code 2.
    Usage,
    /// Control was not reached. Exit code 3.
    Unreachable,
}

#[derive(Debug)]
pub(crate) struct Failure {
    fault: Fault,
    operation: String,
    object: String,
    cause: String,
    remedy: String,
}

impl Failure {
    /// Control answered and refused; `reason` is its stable code.
    pub(crate) fn refused(operation: &str, object: &str, reason: &str, message: &str) -> Self {
        Self {
            // Control read what was typed or written, and could not.
            fault: match reason {
                "invalid" => Fault::Usage,
                _ => Fault::Refused,
            },
            operation: operation.to_owned(),
            object: object.to_owned(),
            cause: format!("control refused: {message} (reason {reason})"),
            remedy: remedy_of(reason, object).to_owned(),
        }
    }

    /// What was typed or written is wrong.
    pub(crate) fn usage(
        operation: &str,
        object: impl fmt::Display,
        cause: impl fmt::Display,
        remedy: &str,
    ) -> Self {
        Self {
            fault: Fault::Usage,
            operation: operation.to_owned(),
            object: object.to_string(),
            cause: cause.to_string(),
            remedy: remedy.to_owned(),
        }
    }

    /// This machine could not do its part.
    pub(crate) fn local(
        operation: &str,
        object: impl fmt::Display,
        cause: impl fmt::Display,
        remedy: &str,
    ) -> Self {
        Self::usage(operation, object, cause, remedy)
    }

    /// Control was not reached, or what answered is not control.
    pub(crate) fn unreachable(object: &str, cause: impl fmt::Display, remedy: &str) -> Self {
        Self {
            fault: Fault::Unreachable,
            operation: "reach".to_owned(),
            object: object.to_owned(),
            cause: cause.to_string(),
            remedy: remedy.to_owned(),
        }
    }

    /// Whether control was not reached.
    pub(crate) fn is_unreachable(&self) -> bool {
        self.fault == Fault::Unreachable
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self.fault {
            Fault::Refused => 1,
            Fault::Usage => 2,
            Fault::Unreachable => 3,
        })
    }
}

/// What to do where the message of control does not say it.
fn remedy_of(reason: &str, object: &str) -> &'static str {
    match reason {
        "not_found" if object.starts_with("token ") => {
            "see what there is with `meshctl token list`"
        }
        "not_authenticated" => {
            "use the admin.yaml that `mesh-control init` of this mesh wrote (--context)"
        }
        "not_found" => "see what there is with `meshctl get`",
        "conflict" => "change it where its owner has it",
        "rate_limited" => "wait a minute",
        "internal" => "look into the log of mesh-control",
        _ => "change what the message names and try again",
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "could not {} {}: {}; {}",
            self.operation, self.object, self.cause, self.remedy
        )
    }
}

impl std::error::Error for Failure {}
