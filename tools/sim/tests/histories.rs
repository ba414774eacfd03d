//! Planted histories: every bad one is rejected for the property in its name, every good one is accepted by all.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use generation_sim::check::{PROPERTIES, check};
use generation_sim::history::History;

fn planted(kind: &str) -> Vec<(String, History)> {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/histories")
        .join(kind);
    let mut found: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            let history =
                History::parse(&fs::read_to_string(&path).unwrap()).unwrap_or_else(|error| panic!("{name}: {error}"));
            (name, history)
        })
        .collect();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

/// The property a file's name begins with.
fn property(name: &str) -> &str {
    name.split('-').next().unwrap()
}

#[test]
fn good_histories_are_accepted() {
    for (name, history) in planted("good") {
        assert_eq!(check(&history), [], "{name}");
    }
}

#[test]
fn bad_histories_are_rejected_for_what_is_wrong_with_them() {
    for (name, history) in planted("bad") {
        let of_name = PROPERTIES.iter().find(|candidate| candidate.name == property(&name));
        let violations = of_name.unwrap_or_else(|| panic!("{name}")).violations(&history);
        assert!(!violations.is_empty(), "{name} was accepted");
    }
}

#[test]
fn every_property_has_a_good_and_a_bad_history() {
    let all: BTreeSet<_> = PROPERTIES.iter().map(|property| property.name.to_owned()).collect();
    for kind in ["good", "bad"] {
        let covered: BTreeSet<_> = planted(kind)
            .iter()
            .map(|(name, _)| property(name).to_owned())
            .collect();
        assert_eq!(covered, all, "{kind}");
    }
}
