//! What can be typed.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};

/// The operator's command line of Meshwork.
#[derive(Debug, Parser)]
#[command(name = "meshctl", version, propagate_version = true)]
pub(crate) struct Args {
    /// Where control is and who you are [default: ~/.config/meshwork/admin.yaml, then
    /// /etc/meshwork/admin.yaml]
    #[arg(long, global = true, value_name = "FILE", env = "MESHCTL_CONTEXT")]
    pub context: Option<PathBuf>,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make, list and revoke join tokens
    Token {
        #[command(subcommand)]
        command: TokenCommand,
    },
    /// Show objects
    Get(Get),
    /// Create or change the services and policies of a file
    Apply(Apply),
    /// Remove an object
    Delete(Delete),
    /// Say who may call what, and by which rule
    Authz(Authz),
    /// List who really calls what: with which identity or in plaintext, and since when
    Edges(Edges),
    /// Look at all that control knows of the mesh: what is wrong, and what to do
    #[command(
        after_help = "Exit codes: 0 nothing failed (warnings may be); 1 a check failed; 2 what was typed is wrong; \
                      3 control was not reached."
    )]
    Check {
        /// Look again until nothing fails, for so long, e.g. 30s or 5m
        #[arg(long, value_name = "DURATION", value_parser = mesh_api::duration::parse)]
        wait: Option<Duration>,
        /// The form of the answer
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
    /// Take back, for ever, what a host, a workload of it or a token was given
    Revoke {
        #[command(subcommand)]
        command: RevokeCommand,
    },
    /// Show how control and the mesh are
    Status {
        /// The form of the answer
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
    /// Write everything that control knows, but its CA key, to a file
    Backup {
        /// A file that does not exist yet
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Write manual pages and completions below a directory, for packages
    #[command(hide = true)]
    Manual { dir: PathBuf },
}

#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Make a join token. Only the token goes to stdout
    Create(CreateToken),
    /// List tokens, without their secrets
    List {
        /// The form of the answer
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
    /// Make a token useless; the same as `meshctl revoke token`
    Revoke(RevokeToken),
}

#[derive(Debug, Subcommand)]
pub(crate) enum RevokeCommand {
    /// Remove a host; all hosts refuse its certificates at once, and what is open with it ends
    Host {
        /// As `meshctl get hosts` shows it
        name: String,
    },
    /// The same for one identity of a host. The host itself stays
    Workload {
        /// Of the identity
        #[arg(value_name = "NS/ACCOUNT")]
        account: String,
        /// On which host
        #[arg(long, value_name = "HOST")]
        host: String,
    },
    /// Make a join token useless
    Token(RevokeToken),
}

#[derive(Debug, clap::Args)]
pub(crate) struct RevokeToken {
    /// As `meshctl token list` shows it, e.g. t-3f9c1a2b4d5e
    pub id: String,
    /// Revoke the hosts that joined with it too; else they stay
    #[arg(long)]
    pub hosts: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  meshctl token create --namespace shop --expires 2h --uses 5")]
pub(crate) struct CreateToken {
    /// A note for lists and the audit log
    #[arg(long)]
    pub name: Option<String>,
    /// All accounts and services of a namespace
    #[arg(long, value_name = "NS")]
    pub namespace: Vec<String>,
    /// An identity the host may hold; each side may end in `*`
    #[arg(long, value_name = "NS/ACCOUNT")]
    pub identity: Vec<String>,
    /// A service the host may serve; each side may end in `*` [default: as the identities]
    #[arg(long, value_name = "NS/SERVICE")]
    pub service: Vec<String>,
    /// A network the host may be in [default: `default`]
    #[arg(long, value_name = "NETWORK")]
    pub network: Vec<String>,
    /// How long the token can be used, e.g. 30m, 1h, 7d
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = mesh_api::duration::parse)]
    pub expires: Duration,
    /// How many hosts can join with it
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub uses: u32,
    /// Let it take over the name of a host that is in the mesh; that host is removed
    #[arg(long)]
    pub replace: bool,
    /// Where hosts reach control [default: as control was told at `init`]
    #[arg(long, value_name = "HOST:PORT")]
    pub address: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Get {
    /// What to show
    #[arg(value_enum)]
    pub kind: Kind,
    /// One object: its name, looked for in all namespaces, or `namespace/name` (`/name`: in none)
    pub name: Option<String>,
    /// Only this namespace; `all` shows all
    #[arg(short, long, value_name = "NS", default_value = "all")]
    pub namespace: String,
    /// The form of the answer
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Format,
    /// Of the audit log: how many of the newest entries
    #[arg(long, default_value_t = 100)]
    pub limit: u32,
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Called agents decide, by the same rules: what a policy says now holds there within a second.\n\n\
                  Example:\n  meshctl authz shop/web --from shop/client"
)]
pub(crate) struct Authz {
    /// Only this service, `namespace/name`
    pub service: Option<String>,
    /// What becomes of this caller's calls: `namespace/account`, `host:NAME`, a SPIFFE id, or the address of
    /// a plaintext caller
    #[arg(long, value_name = "CALLER")]
    pub from: Option<String>,
    /// Only services of this namespace
    #[arg(short, long, value_name = "NS")]
    pub namespace: Option<String>,
    /// The form of the answer
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Format,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Edges {
    /// Only this service, `namespace/name`
    pub service: Option<String>,
    /// Only services of this namespace
    #[arg(short, long, value_name = "NS")]
    pub namespace: Option<String>,
    /// Only plaintext callers
    #[arg(long)]
    pub plaintext: bool,
    /// The form of the answer
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Format,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    meshctl apply -f - <<'END'\n  \
    apiVersion: meshwork.io/v1alpha1\n  \
    kind: Policy\n  \
    metadata: {name: web, namespace: shop}\n  \
    spec:\n    \
      service: web\n    \
      rules:\n    \
      - {name: front, from: [{identity: shop/front}]}\n  \
    END")]
pub(crate) struct Apply {
    /// YAML or JSON, one or more documents; `-` reads stdin
    #[arg(short, long, value_name = "FILE")]
    pub file: PathBuf,
    /// Say what would change, and change nothing
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Delete {
    /// What to remove
    #[arg(value_enum)]
    pub kind: Deletable,
    /// Its name, looked for in all namespaces, or `namespace/name` (`/name`: in none)
    pub name: String,
    /// Only in this namespace
    #[arg(short, long, value_name = "NS")]
    pub namespace: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    #[value(alias = "service")]
    Services,
    #[value(alias = "workload")]
    Workloads,
    #[value(alias = "host")]
    Hosts,
    #[value(alias = "policy")]
    Policies,
    #[value(alias = "revocation")]
    Revocations,
    Audit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Deletable {
    #[value(alias = "services")]
    Service,
    /// Removes a host; the same as `meshctl revoke host`
    #[value(alias = "hosts")]
    Host,
    #[value(alias = "policies")]
    Policy,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    #[default]
    Table,
    Json,
    Yaml,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_definition_holds_together() {
        Args::command().debug_assert();
    }

    #[test]
    fn kinds_are_taken_in_both_numbers() {
        for word in ["service", "services"] {
            let args = Args::try_parse_from(["meshctl", "get", word]).unwrap();
            assert!(matches!(args.command, Command::Get(get) if get.kind == Kind::Services));
        }
        assert!(Args::try_parse_from(["meshctl", "get", "pods"]).is_err());
        assert!(
            Args::try_parse_from(["meshctl", "token", "create", "--uses", "0"]).is_err(),
            "a token that nobody can use"
        );
    }
}
