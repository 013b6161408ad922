//! The forms in which Meshwork's things are written: protobuf between control and agents, YAML for operators,
//! TOML on hosts, frames between agents. Each is read once, at the edge, into the types of `mesh_core`.

pub mod check;
pub mod duration;
pub mod edges;
pub mod frame;
pub mod header;
pub mod message;
pub mod resource;
pub mod stored;
pub mod sync;
pub mod token;
pub mod workload_file;

/// The generated protobuf types (`proto/mesh.proto`).
pub mod proto {
    #![allow(
        clippy::all,
        clippy::allow_attributes_without_reason,
        clippy::too_many_lines,
        clippy::use_self,
        unreachable_pub,
        unused_qualifications,
        missing_docs,
        reason = "generated"
    )]
    tonic::include_proto!("meshwork.v1");
}
