//! The commands' way into a cluster: a client from the configuration, a runtime to run it on, and what its errors mean to a
//! shell.

use std::future::Future;
use std::time::Duration;

use generation_client::{Client, ClientConfig, ConnectError, Error, NotSent};

use super::client_config::Selection;
use super::{Exit, Failure, State};

/// Options of every command that talks to a cluster.
#[derive(Debug, Clone, clap::Args)]
pub struct Connection {
    #[command(flatten)]
    selection: Selection,
    /// Time allowed for each request, retries included, such as 500ms or 10s.
    #[arg(long, value_name = "DURATION", global = true, default_value = "5s", value_parser = positive_duration)]
    timeout: Duration,
}

impl Connection {
    /// The configuration that the options select.
    pub fn config(&self) -> Result<ClientConfig, Failure> {
        let path = self.selection.find()?;
        ClientConfig::load(&path).map_err(|error| {
            let remedy = if path.exists() {
                ""
            } else {
                "; `generation dev` writes one into its data directory"
            };
            Failure::usage(format!("{error}{remedy}"))
        })
    }

    /// Connects to the cluster that the options select.
    pub async fn connect(&self) -> Result<Client, Failure> {
        let client = Client::builder()
            .config(self.config()?)
            .name(concat!("generation-cli/", env!("CARGO_PKG_VERSION")))
            .timeout(self.timeout)
            .connect_timeout(self.timeout.min(Duration::from_secs(3)))
            .connect()
            .await?;
        Ok(client)
    }
}

/// Runs `work` to its end, on this thread.
pub fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Exit::Rejected, format!("no runtime: {error}")))?;
    let result = runtime.block_on(work);
    // A thread that still reads standard input must not hold up the end of the process.
    runtime.shutdown_background();
    result
}

/// A duration of at least a millisecond, as people write it: `500ms`, `30s`, `1h 30m`.
pub fn positive_duration(text: &str) -> Result<Duration, String> {
    let duration = match humantime::parse_duration(text) {
        Ok(duration) => duration,
        Err(_) if text.parse::<f64>().is_ok() => return Err(format!("give it a unit, such as {text}s or {text}ms")),
        Err(error) => return Err(format!("{error}; write it like 500ms, 30s or 1h 30m")),
    };
    if duration < Duration::from_millis(1) {
        return Err("it must be at least 1ms".to_owned());
    }
    Ok(duration)
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        if let Error::NotSent(NotSent::Connect(error)) = error {
            return (*error).into();
        }
        let (exit, state) = match error.state() {
            generation_client::State::NotSent => (Exit::Unavailable, State::NotSent),
            generation_client::State::Rejected if error.current_version().is_some() => {
                (Exit::ConditionFailed, State::Rejected)
            }
            generation_client::State::Rejected => (Exit::Rejected, State::Rejected),
            generation_client::State::InDoubt => (Exit::InDoubt, State::InDoubt),
        };
        Self::new(exit, error.to_string())
            .with_code(error.code())
            .with_state(state)
    }
}

impl From<ConnectError> for Failure {
    fn from(error: ConnectError) -> Self {
        let exit = match error {
            ConnectError::Config(_) => Exit::Usage,
            _ => Exit::Unavailable,
        };
        Self::new(exit, error.to_string()).with_code(error.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use generation_client::{InDoubt, Rejected};

    #[test]
    fn durations_need_a_unit_and_a_length() {
        assert_eq!(positive_duration("1m 30s"), Ok(Duration::from_secs(90)));
        assert_eq!(positive_duration("250ms"), Ok(Duration::from_millis(250)));
        for (text, part) in [
            ("30", "30s"),
            ("1.5", "unit"),
            ("0s", "1ms"),
            ("10us", "1ms"),
            ("soon", "30s"),
            ("-5s", "30s"),
            ("", "30s"),
        ] {
            let error = positive_duration(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn errors_end_with_the_exit_code_of_their_state() {
        let cases: [(Error, Exit, &str); 5] = [
            (
                Rejected::ConditionFailed { current: 7 }.into(),
                Exit::ConditionFailed,
                "condition_failed",
            ),
            (Rejected::NotANumber.into(), Exit::Rejected, "not_a_number"),
            (NotSent::NoQuorum { shard: 1 }.into(), Exit::Unavailable, "no_quorum"),
            (
                InDoubt::Timeout {
                    after: Duration::from_secs(1),
                }
                .into(),
                Exit::InDoubt,
                "timeout",
            ),
            (ConnectError::Config("x".to_owned()).into(), Exit::Usage, "config"),
        ];
        for (error, exit, code) in cases {
            let failure = Failure::from(error);
            assert_eq!((failure.exit, failure.code), (exit, code));
        }
    }
}
