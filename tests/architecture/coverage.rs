//! The table of docs/protocol-coverage.md: what it says is shown by tests that exist.

use std::collections::BTreeSet;

use super::{root, sources};

const TABLE: &str = "docs/protocol-coverage.md";
const COMMANDS: &str = "protocol/src/wire/command.rs";

/// One row of the table.
struct Row {
    item: String,
    server: String,
    client: String,
    shown_by: Vec<String>,
}

impl Row {
    /// Cells are separated by bars; none of them has one in its text.
    fn parse(line: &str) -> Option<Self> {
        let cells: Vec<&str> = line.strip_prefix('|')?.split('|').map(str::trim).collect();
        assert_eq!(cells.len(), 5, "{TABLE}: not four cells: {line}");
        let (item, server, client, shown_by) = (cells[0], cells[1], cells[2], cells[3]);
        let head = item == "item" || item.starts_with("---");
        (!head).then(|| Self {
            item: item.to_owned(),
            server: server.to_owned(),
            client: client.to_owned(),
            shown_by: code(shown_by),
        })
    }

    /// Whether one of the sides is said to have it.
    fn is_claimed(&self) -> bool {
        [&self.server, &self.client].iter().any(|cell| {
            let word = cell.split([',', ':', ';', ' ']).next().unwrap_or_default();
            !matches!(word, "no" | "-")
        })
    }
}

/// What stands between backticks.
fn code(text: &str) -> Vec<String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

fn rows() -> Vec<Row> {
    let text = std::fs::read_to_string(root().join(TABLE)).unwrap();
    let rows: Vec<Row> = text.lines().filter_map(Row::parse).collect();
    assert!(rows.len() > 100, "{TABLE} has {} rows", rows.len());
    rows
}

/// Whether a source has a test of this name: an attribute, perhaps others, and the function, or the
/// macro that makes tests of it.
fn has_test(source: &str, name: &str) -> bool {
    let head = format!("fn {name}(");
    let on_both = format!("on_both_hypervisors!({name});");
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    if lines.contains(&on_both.as_str()) {
        return true;
    }
    let defined = lines.iter().position(|line| line.starts_with(&head));
    defined.is_some_and(|at| {
        let above = lines[..at].iter().rev();
        let mut above = above.take_while(|line| line.starts_with("#[") || line.starts_with("//"));
        above.any(|line| *line == "#[test]")
    })
}

#[test]
fn every_test_that_the_coverage_names_exists() {
    let mut wrong = BTreeSet::new();
    for Row { item, shown_by, .. } in rows() {
        for reference in shown_by {
            let Some((file, name)) = reference.split_once("::") else {
                wrong.insert(format!("{item}: {reference} is not file::test"));
                continue;
            };
            match std::fs::read_to_string(root().join(file)) {
                Ok(source) if has_test(&source, name) => {}
                Ok(_) => _ = wrong.insert(format!("{file} has no test {name}")),
                Err(error) => _ = wrong.insert(format!("{file}: {error}")),
            }
        }
    }
    assert!(wrong.is_empty(), "{TABLE}:\n{}", wrong.into_iter().collect::<Vec<_>>().join("\n"));
}

#[test]
fn whatever_the_coverage_claims_is_shown_by_a_test() {
    let bare = rows().into_iter().filter(|row| row.is_claimed() && row.shown_by.is_empty());
    let bare: Vec<String> = bare.map(|row| row.item).collect();
    assert!(bare.is_empty(), "{TABLE}: claimed and shown by nothing:\n{}", bare.join("\n"));
}

#[test]
fn every_command_of_the_codec_is_in_the_coverage() {
    let (_, source) =
        sources("protocol/src/wire").into_iter().find(|(name, _)| name == COMMANDS).unwrap();
    let documented = source.lines().filter(|line| line.trim_start().starts_with("///"));
    let commands: Vec<String> = documented
        .flat_map(code)
        .filter_map(|word| word.strip_prefix("VFIO_USER_").map(str::to_owned))
        .collect();
    assert!(commands.len() >= 17, "{COMMANDS} documents its commands: {commands:?}");
    let items: Vec<String> = rows().into_iter().map(|row| row.item).collect();
    let missing = commands.iter().filter(|name| {
        // DEVICE_ is left out where the rest of the name is enough.
        let short = name.strip_prefix("DEVICE_").unwrap_or(name);
        let named =
            |item: &String| [name.as_str(), short].iter().any(|name| item.starts_with(name));
        !items.iter().any(named)
    });
    let missing: Vec<&String> = missing.collect();
    assert!(missing.is_empty(), "{TABLE} does not have {missing:?}");
}
