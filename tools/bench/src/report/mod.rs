//! What people and programs read after a run: tables, JSON, HDR logs, a page, differences.

pub mod diff;
pub mod hdr_log;
pub mod html;
pub mod table;

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::BenchError;
use crate::compare::Comparison;
use crate::result::RunResult;
use crate::system::Environment;

/// The contents of a `--json` file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Report {
    /// Single runs, one after the other: a `run`, or the steps of a `sweep`.
    Runs {
        /// Version of this layout.
        format: u32,
        /// Where they were measured.
        environment: Box<Environment>,
        /// The runs.
        runs: Vec<RunResult>,
    },
    /// A `compare`.
    Comparison {
        /// Version of this layout.
        format: u32,
        /// The comparison.
        comparison: Box<Comparison>,
    },
}

/// Version of the JSON's layout.
pub const FORMAT: u32 = 1;

impl Report {
    /// Writes it as JSON.
    pub fn write(&self, path: &Path) -> Result<(), BenchError> {
        let text = serde_json::to_vec_pretty(self).map_err(|error| report_error(path, &error))?;
        std::fs::write(path, text).map_err(|error| report_error(path, &error))
    }

    /// Reads it from JSON.
    pub fn read(path: &Path) -> Result<Self, BenchError> {
        let text = std::fs::read(path).map_err(|error| report_error(path, &error))?;
        let report: Self = serde_json::from_slice(&text).map_err(|error| report_error(path, &error))?;
        let (Self::Runs { format, .. } | Self::Comparison { format, .. }) = &report;
        if *format > FORMAT {
            return Err(report_error(
                path,
                &format!("its layout is of version {format}, this program knows {FORMAT}"),
            ));
        }
        Ok(report)
    }
}

pub(crate) fn report_error(path: &Path, error: &dyn std::fmt::Display) -> BenchError {
    BenchError::Report {
        path: path.display().to_string(),
        message: error.to_string(),
    }
}
