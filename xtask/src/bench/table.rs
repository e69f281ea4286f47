//! Tables that read well on a terminal and are Markdown.

/// Rows of cells, the first of them the head.
#[derive(Debug, Clone, Default)]
pub struct Table(Vec<Vec<String>>);

impl Table {
    /// A table with this head.
    #[must_use]
    pub fn new(head: &[&str]) -> Self {
        Self(vec![head.iter().map(|&cell| cell.to_owned()).collect()])
    }

    /// Adds a row; a bar in a cell would end it and becomes a slash.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.0.push(cells.into_iter().map(|cell| cell.replace('|', "/").replace('\n', " ")).collect());
    }

    /// The first column to the left, the others to the right, as numbers are.
    #[must_use]
    pub fn render(&self) -> String {
        let columns = self.0.iter().map(Vec::len).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns)
            .map(|n| {
                self.0
                    .iter()
                    .filter_map(|row| row.get(n))
                    .map(|c| c.chars().count())
                    .max()
                    .unwrap_or(0)
                    .max(3)
            })
            .collect();
        let mut text = String::new();
        for (at, row) in self.0.iter().enumerate() {
            for (n, width) in widths.iter().enumerate() {
                let cell = row.get(n).map_or("", String::as_str);
                text.push_str(&if n == 0 {
                    format!("| {cell:<width$} ")
                } else {
                    format!("| {cell:>width$} ")
                });
            }
            text.push_str("|\n");
            if at == 0 {
                for (n, width) in widths.iter().enumerate() {
                    let line = "-".repeat(width + 1);
                    text.push_str(&if n == 0 { format!("|{line}-") } else { format!("|{line}:") });
                }
                text.push_str("|\n");
            }
        }
        text
    }
}

/// Nothing, or a number with so many digits after the point.
#[must_use]
pub fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
}

/// A share as a percentage.
#[must_use]
pub fn percent(share: Option<f64>) -> String {
    share.map_or_else(|| "-".to_owned(), |share| format!("{:.1} %", share * 100.0))
}

/// Bytes in MiB.
#[must_use]
pub fn mebibytes(bytes: Option<u64>) -> String {
    number(bytes.map(|bytes| bytes as f64 / f64::from(1 << 20)), 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new(&["who", "MB/s"]);
        table.row(["ka".to_owned(), number(Some(118.26), 1)]);
        table.row(["a | b\nc".to_owned()]);
        assert_eq!(
            table.render(),
            "| who     |  MB/s |\n|---------|------:|\n| ka      | 118.3 |\n| a / b c |       |\n"
        );
        assert_eq!(Table::default().render(), "");
    }

    #[test]
    fn what_is_not_known_is_a_dash() {
        assert_eq!((number(None, 2), percent(None), mebibytes(None)), ("-".into(), "-".into(), "-".into()));
        assert_eq!((percent(Some(0.985)), mebibytes(Some(3 << 19))), ("98.5 %".into(), "1.5".into()));
    }
}
