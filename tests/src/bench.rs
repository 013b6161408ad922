//! The benchmark: the same servers called directly, through a pair of agents and through pairs of other proxies, in
//! interleaved rounds of one run, so that a busy machine bears on all alike. What counts is the CPU of the pair.

#![expect(clippy::print_stdout, reason = "figures are what it is for")]

mod certificates;
mod envoy;
mod figures;
mod growth;
mod haproxy;
mod relay;
mod subjects;
mod usage;
mod workloads;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::ValueEnum;
use clap::builder::PossibleValue;
use serde_json::Value;

use self::figures::{Figures, Metric, Place, Report};
use self::growth::{Grown, Open};
use self::subjects::Stage;
use crate::site::Site;

pub use self::subjects::Subject;
pub use self::workloads::{Load, Workload};

/// Rounds of a full run: the median of five bears two bad ones.
const ROUNDS: usize = 5;
/// Growth is a tenth at most, so that it wants more of them.
const ROUNDS_OF_GROWTH: usize = 15;
const ROUNDS_QUICK: usize = 2;
/// Length of one cell: connections and their handshakes are made within it, and must not weigh.
const CELL: Duration = Duration::from_secs(5);
const CELL_QUICK: Duration = Duration::from_secs(2);
/// How much longer than its cell a tool may take.
const TOOL_MAX: Duration = Duration::from_secs(60);

/// What can be measured by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Load(Workload),
    /// Memory with open connections.
    Idle,
    /// CPU per request with more services, endpoints and rules.
    Growth,
}

impl Part {
    const ALL: [Self; 8] = [
        Self::Load(Workload::Http),
        Self::Load(Workload::Tcp),
        Self::Load(Workload::Grpc),
        Self::Load(Workload::Bulk),
        Self::Load(Workload::Short),
        Self::Load(Workload::Fair),
        Self::Idle,
        Self::Growth,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Load(workload) => workload.name(),
            Self::Idle => "idle",
            Self::Growth => "growth",
        }
    }
}

impl ValueEnum for Part {
    fn value_variants<'a>() -> &'a [Self] {
        &Self::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.name()))
    }
}

/// What to measure; an empty list stands for all.
#[derive(Clone, Debug, Default)]
pub struct Options {
    pub quick: bool,
    pub rounds: Option<usize>,
    /// Length of a cell.
    pub seconds: Option<u64>,
    pub only: Vec<Part>,
    pub loads: Vec<Load>,
    pub subjects: Vec<Subject>,
    pub json: Option<PathBuf>,
}

/// The cells of a run as they come.
#[derive(Default)]
struct Cells(BTreeMap<Place, Vec<Figures>>);

impl Cells {
    fn add(&mut self, workload: &str, load: &str, subject: Subject, figures: Figures) {
        let subject = subject.name();
        println!("{workload} {load} {subject}: {}", figures::line(&figures));
        let place = Place {
            workload: workload.to_owned(),
            load: load.to_owned(),
            subject: subject.to_owned(),
        };
        self.0.entry(place).or_default().push(figures);
    }
}

impl Options {
    /// How many rounds of which length.
    fn rounds_and_cell(&self, full: usize) -> (usize, Duration) {
        let (rounds, cell) = match self.quick {
            true => (ROUNDS_QUICK, CELL_QUICK),
            false => (full, CELL),
        };
        let cell = self.seconds.map_or(cell, Duration::from_secs);
        (self.rounds.unwrap_or(rounds), cell)
    }
}

/// Measures, prints, writes JSON if a file is named, and returns it.
pub fn run(options: &Options) -> Value {
    let parts = chosen(&options.only, &Part::ALL);
    let mut cells = Cells::default();
    if parts.iter().any(|part| *part != Part::Growth) {
        compare(options, &parts, &mut cells);
    }
    if parts.contains(&Part::Growth) {
        grow(options, &mut cells);
    }
    let report = Report::of(&cells.0);
    println!("\nMedians of the rounds:\n\n{}", report.tables());
    let json = report.json();
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&json).expect("JSON");
        std::fs::write(path, text + "\n").unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }
    json
}

/// All subjects between the same two hosts, taking turns.
fn compare(options: &Options, parts: &[Part], cells: &mut Cells) {
    let site = Site::new("bench");
    let subjects = chosen(&options.subjects, &Subject::ALL);
    let stage = Stage::new(&site, &subjects);
    if parts.contains(&Part::Idle) {
        // First: under load the pools and buffers of all have grown.
        for subject in &subjects {
            for open in Open::ALL {
                if let Some(figures) = growth::memory(&stage, *subject, open) {
                    cells.add(Part::Idle.name(), open.name(), *subject, figures);
                }
            }
        }
    }
    let (rounds, cell) = options.rounds_and_cell(ROUNDS);
    for round in 0..rounds {
        for part in parts {
            let Part::Load(workload) = *part else {
                continue;
            };
            for load in chosen(&options.loads, &Load::ALL) {
                let mut order = subjects.clone();
                // Nobody always runs after the same one.
                order.rotate_left(round % subjects.len());
                order.retain(|subject| workload.has(load) && workload.is_of(*subject));
                for subject in order {
                    let figures = measure(&stage, subject, workload, load, cell);
                    cells.add(workload.name(), load.name(), subject, figures);
                }
            }
        }
    }
}

/// Meshes of several sizes, taking turns.
fn grow(options: &Options, cells: &mut Cells) {
    let meshes = Grown::COUNTS.map(|count| {
        let site = Site::new("bench-growth");
        let grown = Grown::new(&site, count);
        (grown, site)
    });
    let (rounds, cell) = options.rounds_and_cell(ROUNDS_OF_GROWTH);
    for round in 0..rounds {
        let mut order: Vec<&Grown> = meshes.iter().map(|(grown, _)| grown).collect();
        order.rotate_left(round % meshes.len());
        for grown in order {
            let figures = grown.measure(cell);
            cells.add(
                Part::Growth.name(),
                &grown.load(),
                Subject::Meshwork,
                figures,
            );
        }
    }
}

/// The tables of a run whose JSON was kept.
pub fn show(json: &Path) {
    let text = std::fs::read_to_string(json);
    let report = text
        .map_err(|e| e.to_string())
        .and_then(|text| Report::parse(&text));
    let report = report.unwrap_or_else(|e| panic!("{}: {e}", json.display()));
    print!("{}", report.tables());
}

fn chosen<T: Copy>(chosen: &[T], all: &[T]) -> Vec<T> {
    if chosen.is_empty() {
        all.to_vec()
    } else {
        chosen.to_vec()
    }
}

fn measure(
    stage: &Stage,
    subject: Subject,
    workload: Workload,
    load: Load,
    cell: Duration,
) -> Figures {
    let authority = stage.authority(subject, workload.way());
    let scratch = stage.scratch();
    let line = workloads::command(workload, load, &authority, cell, &scratch);
    let before = stage.cpu_us(subject);
    let output = stage.client(&line).deadline(cell + TOOL_MAX).ok();
    let after = stage.cpu_us(subject);
    let (requests, mut figures) = workloads::read(workload, load, &output, &scratch);
    if let (Some(before), Some(after)) = (before, after) {
        let per_request = (after - before) / requests;
        match workload {
            Workload::Bulk => {
                // 1 us a byte is 1e-6 s for 1e-9 GB.
                let per_byte = per_request / workloads::BULK_BODY as f64;
                figures.insert(Metric::CpuPerGb, per_byte * 1e3);
            }
            // Most of it is the bulk's.
            Workload::Fair => {}
            _ => drop(figures.insert(Metric::CpuPerRequest, per_request)),
        }
    }
    if let Some(rss) = stage.rss_mib(subject) {
        figures.insert(Metric::Rss, rss);
    }
    figures
}
