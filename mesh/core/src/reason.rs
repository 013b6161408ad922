//! Every refusal has one stable reason: the same code in log, metric, the response header `x-meshwork-reason`,
//! the wire and `docs/reasons.md`. Numbers are for the wire and are never given out again.

use std::fmt;

/// Whose fault a refusal is. It decides log level and whether trying elsewhere can help.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// The caller, or the peer's agent.
    Peer,
    /// The operator's policy or scope, working as written.
    Policy,
    /// The called service or its host.
    Upstream,
    /// This process or its host.
    Local,
}

macro_rules! reasons {
    ($($variant:ident = $number:literal, $code:literal, $fault:ident, $status:literal, $text:literal;)*) => {
        /// Why something was refused.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u16)]
        pub enum Reason { $(#[doc = $text] $variant = $number,)* }

        impl Reason {
            /// All reasons, in the order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The stable code, as operators see it.
            pub const fn code(self) -> &'static str {
                match self { $(Self::$variant => $code,)* }
            }

            /// Whose fault it is.
            pub const fn fault(self) -> Fault {
                match self { $(Self::$variant => Fault::$fault,)* }
            }

            /// The HTTP status that the agent or control answers with.
            pub const fn http_status(self) -> u16 {
                match self { $(Self::$variant => $status,)* }
            }

            /// What happened and what to do, for people.
            pub const fn text(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }

            /// Reads the number of the wire. A number of a newer peer is [`Reason::Unspecified`].
            pub const fn from_wire(number: u16) -> Self {
                match number { $($number => Self::$variant,)* _ => Self::Unspecified }
            }
        }
    };
}

reasons! {
    Unspecified = 0, "unspecified", Upstream, 503, "the peer gave no reason that this version knows";
    // The calling agent.
    NotCaptured = 1, "not_captured", Peer, 403, "the destination is no address of the mesh; a program dialled the agent's listener directly";
    NoSuchService = 2, "no_such_service", Peer, 503, "no service of the mesh has this address and port; see `meshctl get services`";
    CallerUnknown = 3, "caller_unknown", Local, 503, "the kernel could not tell whose the connection is; map its program in services.d";
    NoIdentity = 4, "no_identity", Local, 503, "the calling workload has no valid certificate; see `mesh-agent status`";
    NoEndpoints = 5, "no_endpoints", Upstream, 503, "the service has no endpoint; see `meshctl get services`";
    EndpointsUnknown = 6, "endpoints_unknown", Local, 503, "control is not reached and no stored answer says where the service is";
    PeerUnreachable = 7, "peer_unreachable", Upstream, 503, "the mesh port of the service's host does not answer";
    PeerHandshake = 8, "peer_handshake", Upstream, 503, "the TLS handshake with the service's agent failed";
    PeerIdentity = 9, "peer_identity", Upstream, 503, "the service's agent showed another identity than control named";
    PeerLost = 10, "peer_lost", Upstream, 503, "the connection to the service's agent broke during the call";
    TooManyHeld = 11, "too_many_held", Local, 503, "too many connections wait for their endpoints at once";
    Timeout = 12, "timeout", Upstream, 504, "the service did not answer in time";
    Overloaded = 13, "overloaded", Local, 503, "a limit of connections, streams or memory is reached; see `mesh-agent status`";
    Draining = 14, "draining", Upstream, 503, "the agent is shutting down and takes no new calls";
    AgentStopped = 15, "agent_stopped", Upstream, 502, "an agent was stopped, and the call was still open after its `timeouts.drain_s`";
    NotTheOwner = 16, "not_the_owner", Peer, 403, "the local port or socket belongs to another workload than the program that called it; see services.d";
    // HTTP.
    HttpMalformed = 20, "http_malformed", Peer, 400, "the HTTP message could be read in two ways or breaks RFC 9112";
    HttpHeadTooLarge = 21, "http_head_too_large", Peer, 431, "the HTTP head is larger than the limit";
    HttpResponseMalformed = 22, "http_response_malformed", Upstream, 502, "the service's HTTP response breaks RFC 9112";
    HttpFlood = 25, "http_flood", Peer, 429, "the HTTP/2 connection asked for work without end (resets, pings, settings, empty frames) and was ended";
    HttpUnsupported = 26, "http_unsupported", Upstream, 501, "the service does not take extended CONNECT (RFC 8441)";
    HttpHeadTimeout = 27, "http_head_timeout", Peer, 408, "the head of the HTTP request did not come whole in time";
    // The called agent: certificate.
    NotTls = 30, "not_tls", Peer, 503, "what came to the mesh port is not TLS 1.3";
    NoCertificate = 31, "no_certificate", Peer, 503, "the peer showed no certificate";
    CertificateMalformed = 32, "certificate_malformed", Peer, 503, "the certificate has not exactly one SPIFFE id, or its Source can not be read";
    UnknownTrustDomain = 33, "unknown_trust_domain", Peer, 503, "no root is known for the certificate's trust domain";
    UntrustedIssuer = 34, "untrusted_issuer", Peer, 503, "the certificate was not issued under the root of its trust domain";
    CertificateExpired = 35, "certificate_expired", Peer, 503, "the certificate is expired or not valid yet; check both clocks";
    IdentityKind = 36, "identity_kind", Peer, 503, "this kind of identity is not accepted here";
    UnknownServerName = 37, "unknown_server_name", Peer, 503, "no workload of this host has the identity that the SNI asks for";
    PeerRevoked = 38, "peer_revoked", Policy, 403, "the operator revoked the host or the workload at the other end; see `meshctl get revocations`";
    SourceMissing = 39, "source_missing", Peer, 503, "the certificate does not name the host that it was given to, so that it could not be revoked";
    // The called agent: stream.
    HeaderVersion = 40, "header_version", Peer, 503, "the stream's header has a version that this agent does not know; upgrade the older side";
    HeaderMalformed = 41, "header_malformed", Peer, 503, "the stream's header could not be read";
    NoSuchPort = 42, "no_such_port", Upstream, 503, "the called workload declares no such service and port";
    NotAllowed = 43, "not_allowed", Policy, 403, "no rule allows this caller; see `meshctl get policies`";
    PolicyUnknown = 44, "policy_unknown", Local, 503, "the called agent never received its policies; is control reached?";
    AppUnreachable = 45, "app_unreachable", Upstream, 503, "the service does not listen on its declared port, or no plaintext endpoint of it answers";
    AppNotOwner = 46, "app_not_owner", Upstream, 503, "another program than the workload's owner listens on the declared port";
    AppReset = 47, "app_reset", Upstream, 502, "the service closed the connection before its answer was whole";
    AppFamily = 48, "app_family", Upstream, 503, "the service listens only in an address family that the caller's address has not";
    ProtocolError = 49, "protocol_error", Peer, 502, "the peer's agent broke the rules of the stream layer";
    Cancelled = 50, "cancelled", Peer, 499, "the caller went away";
    StreamReset = 51, "stream_reset", Upstream, 502, "the program at the other end ended its HTTP/2 stream with an error code of its own";
    PlaintextRefused = 53, "plaintext_refused", Policy, 403, "the service's transport is strict and the caller came in plaintext; call it by its mesh name, or except the caller by `meshwork.io/plaintext-from`";
    RevocationsUnknown = 54, "revocations_unknown", Local, 503, "the list of what was revoked can not be read from this host's disk, so nobody is believed until control is reached";
    HeadDropped = 55, "head_dropped", Local, 502, "an agent had no room for the head of an answer, or for trailers (limit `heads`); the program had the request";
    // Control.
    TokenMalformed = 60, "token_malformed", Peer, 400, "the join token is truncated or mistyped; copy it whole";
    TokenUnknown = 61, "token_unknown", Peer, 401, "no such join token, or its secret is wrong";
    TokenExpired = 62, "token_expired", Peer, 401, "the join token is expired; make a new one with `meshctl token create`";
    TokenUsed = 63, "token_used", Peer, 401, "the join token was used as often as it may be";
    TokenRevoked = 64, "token_revoked", Peer, 401, "the join token was revoked";
    HostNameTaken = 65, "host_name_taken", Peer, 409, "a host of this name is in the mesh; use another name or a token made with `--replace`";
    OutOfScope = 66, "out_of_scope", Policy, 403, "the host's token does not allow this identity, service or network";
    AddressTaken = 67, "address_taken", Peer, 409, "another host of this network has the address";
    AddressUnproven = 68, "address_unproven", Upstream, 409, "control could not prove that the host's agent answers at its address";
    ServiceConflict = 69, "service_conflict", Peer, 409, "the service exists with other ports or protocols; its owner decides them";
    NotAuthenticated = 70, "not_authenticated", Peer, 401, "the call needs a valid certificate or bearer token";
    NotAuthorized = 71, "not_authorized", Policy, 403, "the caller may not do this";
    Invalid = 72, "invalid", Peer, 400, "the request or resource is not valid";
    NotFound = 73, "not_found", Peer, 404, "there is no such object";
    Conflict = 74, "conflict", Peer, 409, "the object is owned by another source";
    RateLimited = 75, "rate_limited", Peer, 429, "too many attempts from this address; wait a minute";
    HostRevoked = 76, "host_revoked", Policy, 403, "the host was removed from the mesh; join it again";
    HostCloned = 77, "host_cloned", Peer, 409, "another machine is connected with this host's credential";
    BadRequestKey = 78, "bad_request_key", Peer, 400, "the certificate request is not signed by its own key or is of a kind that is not issued";
    Unhealthy = 79, "unhealthy", Upstream, 503, "the health check of the service fails on this host";
    VipExhausted = 80, "vip_exhausted", Local, 503, "the range of virtual addresses is used up; set a larger one at `init`";
    IdentityRevoked = 82, "identity_revoked", Policy, 403, "the operator revoked this identity on this host; `mesh-agent leave` and join again to have it anew";
    Internal = 81, "internal", Local, 500, "the server failed; see its log";
}

impl Reason {
    /// The number of the wire.
    pub const fn to_wire(self) -> u16 {
        self as u16
    }

    /// Whether the call certainly did nothing, so that another endpoint may be tried without harm.
    pub const fn is_retryable(self) -> bool {
        matches!(
            self,
            Self::PeerUnreachable
                | Self::PeerHandshake
                | Self::PeerIdentity
                | Self::Draining
                | Self::AppUnreachable
                | Self::AppNotOwner
                | Self::NoSuchPort
                | Self::UnknownServerName
                | Self::Overloaded
        )
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn codes_and_numbers_are_unique_and_read_back() {
        let codes: BTreeSet<_> = Reason::ALL.iter().map(|r| r.code()).collect();
        assert_eq!(codes.len(), Reason::ALL.len());
        for reason in Reason::ALL {
            assert_eq!(Reason::from_wire(reason.to_wire()), *reason);
        }
        assert_eq!(Reason::from_wire(60_000), Reason::Unspecified);
    }
}
