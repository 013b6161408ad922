//! Aligned tables: no colour, no lines, two blanks between columns.

/// What stands in a cell that has nothing to say, so that columns can be cut by scripts.
const EMPTY: &str = "-";

#[derive(Debug)]
pub(crate) struct Table {
    head: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(head: &[&'static str]) -> Self {
        Self {
            head: head.to_vec(),
            rows: Vec::new(),
        }
    }

    pub(crate) fn row(&mut self, cells: Vec<String>) {
        debug_assert_eq!(cells.len(), self.head.len(), "a row of {:?}", self.head);
        self.rows
            .push(cells.into_iter().map(|c| clean(&c)).collect());
    }

    pub(crate) fn render(&self) -> String {
        let mut widths: Vec<usize> = self.head.iter().map(|h| h.chars().count()).collect();
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut text = String::new();
        let head: Vec<String> = self.head.iter().map(|h| (*h).to_owned()).collect();
        for row in std::iter::once(&head).chain(&self.rows) {
            let cells = row.iter().zip(&widths);
            let line: Vec<String> = cells.map(|(c, width)| format!("{c:width$}")).collect();
            text.push_str(line.join("  ").trim_end());
            text.push('\n');
        }
        text
    }
}

/// A cell is one line; names come from hosts, so control characters are shown, not obeyed.
fn clean(cell: &str) -> String {
    if cell.is_empty() {
        return EMPTY.to_owned();
    }
    cell.chars()
        .flat_map(|c| {
            let escaped = c.is_control();
            let shown: String = if escaped {
                c.escape_default().collect()
            } else {
                c.to_string()
            };
            shown.chars().collect::<Vec<_>>()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&["NAME", "VIP"]);
        table.row(vec!["web".into(), "252.64.0.2".into()]);
        table.row(vec!["a-long-name".into(), String::new()]);
        assert_eq!(
            table.render(),
            "NAME         VIP\nweb          252.64.0.2\na-long-name  -\n"
        );
    }

    #[test]
    fn a_name_can_not_drive_the_terminal() {
        let mut table = Table::new(&["NAME"]);
        table.row(vec!["a\u{1b}[2J\nb".into()]);
        assert_eq!(table.render(), "NAME\na\\u{1b}[2J\\nb\n");
    }
}
