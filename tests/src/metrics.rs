//! Reading Prometheus text, as a scraper does.

/// All samples of one scrape.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    samples: Vec<Sample>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub name: String,
    pub labels: Vec<(String, String)>,
    pub value: f64,
}

impl Metrics {
    pub fn parse(text: &str) -> Self {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        Self {
            samples: lines.filter_map(sample).collect(),
        }
    }

    /// The sum of the samples of that name that have all these labels.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.all(name, labels).map(|s| s.value).sum()
    }

    pub fn all<'a>(
        &'a self,
        name: &'a str,
        labels: &'a [(&'a str, &'a str)],
    ) -> impl Iterator<Item = &'a Sample> {
        self.samples.iter().filter(move |sample| {
            let has = |(name, value): &(&str, &str)| sample.label(name) == Some(value);
            sample.name == name && labels.iter().all(has)
        })
    }
}

impl Sample {
    pub fn label(&self, name: &str) -> Option<&str> {
        let found = self.labels.iter().find(|(n, _)| n == name);
        found.map(|(_, value)| value.as_str())
    }
}

fn sample(line: &str) -> Option<Sample> {
    let (name, labels, value) = match line.split_once('{') {
        Some((name, rest)) => {
            let (labels, value) = rest.rsplit_once('}')?;
            (name, labels, value)
        }
        None => {
            let (name, value) = line.split_once(' ')?;
            (name, "", value)
        }
    };
    Some(Sample {
        name: name.to_owned(),
        labels: pairs(labels),
        value: value.split_whitespace().next()?.parse().ok()?,
    })
}

/// `a="b",c="d"`. Values of ours have no quotes in them.
fn pairs(text: &str) -> Vec<(String, String)> {
    let mut pairs = Vec::new();
    let mut rest = text;
    while let Some((name, after)) = rest.split_once("=\"") {
        let Some((value, after)) = after.split_once('"') else {
            break;
        };
        pairs.push((name.trim_start_matches(',').to_owned(), value.to_owned()));
        rest = after;
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_go_over_the_labels_that_are_not_asked_for() {
        let text = "# HELP x y\nm_total{a=\"1\",b=\"x, y\"} 2\nm_total{a=\"1\",b=\"z\"} 3\nm_total{a=\"2\",b=\"z\"} 4\nn 7\n";
        let metrics = Metrics::parse(text);
        assert_eq!(metrics.sum("m_total", &[("a", "1")]), 5.0);
        assert_eq!(metrics.sum("m_total", &[("b", "x, y")]), 2.0);
        assert_eq!(metrics.sum("n", &[]), 7.0);
        assert_eq!(metrics.sum("absent", &[]), 0.0);
    }
}
