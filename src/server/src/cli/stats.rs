//! `generation stats`: the counters of every node.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use super::connection::{Connection, block_on};
use super::{Exit, Failure, Globals, serve};

/// Options of `generation stats`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    generation stats\n  \
    generation stats --node 2\n  \
    generation stats --json | jq '.stats[\"core.0.turns\"]'\n\n\
    Counters grow from a node's start on; what is done a second is the difference of two looks. A node that does not answer\n\
    is reported on standard error; the exit code is 5 then.")]
pub struct Args {
    #[command(flatten)]
    connection: Connection,
    /// Only this node's.
    #[arg(long, value_name = "NODE")]
    node: Option<u64>,
}

/// Runs `generation stats`.
pub fn run(args: &Args, globals: &Globals) -> Result<Exit, Failure> {
    let answers = block_on(async {
        let client = args.connection.connect().await?;
        let answers = match args.node {
            Some(node) => vec![(node, client.stats_of(node).await)],
            None => client.stats().await,
        };
        client.close().await;
        Ok(answers)
    })?;
    let (mut text, mut silence) = (String::new(), None);
    for (node, answer) in answers {
        match answer {
            Ok(answer) if globals.json => {
                let stats = answer.stats.iter();
                let stats: Map<String, Value> = stats
                    .map(|(name, value)| (name.clone(), json!(value.to_string())))
                    .collect();
                let line = json!({ "node": node, "addr": answer.addr, "stats": stats });
                // Writing to a string does not fail.
                let _ = writeln!(text, "{line}");
            }
            Ok(answer) => {
                for (name, value) in &answer.stats {
                    let _ = writeln!(text, "node.{node}.{name} {value}");
                }
            }
            Err(error) => silence = Some(Failure::from(error)),
        }
    }
    let printed = serve::print(&text)?;
    silence.map_or(Ok(printed), Err)
}
