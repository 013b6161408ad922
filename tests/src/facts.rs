//! What is so on a host, to be compared before and after.

use std::collections::BTreeSet;

/// What its kernel was told, a command line each.
pub const KERNEL: &[&str] = &[
    "nft list ruleset",
    // But for the number of its other end.
    "ip -o link | sed 's/@if[0-9]*//'",
    // But for whether the kernel has asked others for it already.
    "ip -o address | sed 's/ tentative//'",
    "ip rule",
    "ip -6 rule",
    "ip route show table all",
    "ip -6 route show table all",
    "sysctl -a 2>/dev/null | grep -E '^net\\.(ipv4|ipv6)\\.(conf|ip_|tcp_)' | grep -v stable_secret",
    "ss -Hltun",
    // But for inodes.
    "ss -Hlx | awk '{ print $1, $2, $5 }'",
];

/// What `run` says to each of these lines, one fact a line.
pub fn of<'a>(
    lines: impl IntoIterator<Item = &'a &'a str>,
    run: impl Fn(&str) -> String,
) -> BTreeSet<String> {
    let mut facts = BTreeSet::new();
    for line in lines {
        let text = run(line);
        facts.extend(text.lines().map(|fact| format!("{line}: {}", fact.trim())));
    }
    facts
}

#[track_caller]
pub fn assert_same(before: &BTreeSet<String>, after: &BTreeSet<String>) {
    let left: Vec<&String> = after.difference(before).collect();
    let lost: Vec<&String> = before.difference(after).collect();
    assert!(
        left.is_empty() && lost.is_empty(),
        "left: {left:#?}\nlost: {lost:#?}"
    );
}
