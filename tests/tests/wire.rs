//! Hostile input for every parser of ours, and a second implementation beside ours where there is one. All of it is
//! seeded: a failure names the seed that replays it. Golden bytes stand beside the forms themselves, in `mesh/api`.

#![expect(clippy::unwrap_used, reason = "a test helper may panic")]

#[path = "wire/corpus.rs"]
mod corpus;
#[path = "wire/differential.rs"]
mod differential;
#[path = "wire/forms.rs"]
mod forms;
#[path = "wire/http1.rs"]
mod http1;

use mesh_core::rng::Rng;
use meshwork_tests::fuzz::grammar;

/// Mutants of each corpus: enough that each byte is changed several times, and seconds in all.
const MUTANTS: u64 = 20_000;

/// The corpus with one to four random changes each, by seed.
fn mutants(corpus: &[&str]) -> impl Iterator<Item = (u64, Vec<u8>)> + use<> {
    let corpus: Vec<Vec<u8>> = corpus.iter().map(|text| text.as_bytes().to_vec()).collect();
    byte_mutants(&corpus)
}

fn byte_mutants(corpus: &[Vec<u8>]) -> impl Iterator<Item = (u64, Vec<u8>)> + use<> {
    let corpus = corpus.to_vec();
    (0..MUTANTS).map(move |seed| {
        let mut rng = Rng::new(seed);
        let mut bytes = corpus[rng.below(corpus.len() as u64) as usize].clone();
        for _ in 0..=rng.below(4) {
            grammar::change(&mut rng, &mut bytes);
        }
        (seed, bytes)
    })
}

/// Runs a target for each seed and adds up what it counts. `MESHWORK_SEED` runs that seed alone.
fn seeds(count: u64, run: impl Fn(u64) -> usize) -> usize {
    let only = std::env::var("MESHWORK_SEED");
    let only = only.ok().map(|seed| seed.parse::<u64>().unwrap());
    let range = only.map_or(0..count, |seed| seed..seed + 1);
    range
        .map(|seed| {
            let named = Named(seed);
            let result = run(seed);
            std::mem::forget(named);
            result
        })
        .sum()
}

/// Dropped by a panic only: says which seed it was.
struct Named(u64);

impl Drop for Named {
    #[expect(clippy::print_stderr, reason = "a test says how to run it again")]
    fn drop(&mut self) {
        eprintln!("MESHWORK_SEED={} runs this case alone", self.0);
    }
}
