//! Command line of the latency harness; see the library for how it measures.

use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Parser;
use generation_bench::BenchError;
use generation_bench::cli::{
    self, CanonicalArgs, Cli, Command, CompareArgs, OutputArgs, RunArgs, Scenario, SweepArgs, TargetKind,
};
use generation_bench::compare::{self, CompareSettings, Observer, Row, RowResult};
use generation_bench::engine::{Mode, Progress, RunContext, RunSettings, run};
use generation_bench::peers::{DevSettings, Kind, Server, generation_program};
use generation_bench::report::{FORMAT, Report, diff as differences, hdr_log, html, table};
use generation_bench::result::RunResult;
use generation_bench::schedule::Arrival;
use generation_bench::sweep::{SweepSettings, Verdict, sweep};
use generation_bench::system::{self, Environment, Probe, ProcessProbe};
use generation_bench::target::Connector;
use generation_bench::target::generation::GenerationConnector;
use generation_bench::target::memcached::MemcachedConnector;
use generation_bench::target::resp::RespConnector;
use generation_bench::target::tls::TlsFiles;
use generation_bench::workload::{KeyDistribution, Mix, WorkloadSpec};
use indicatif::{ProgressBar, ProgressStyle};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        // The first signal ends the run and prints what was measured; the second ends the program.
        let armed = signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&stop))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&stop)));
        if let Err(error) = armed {
            eprintln!("cannot catch signals: {error}");
        }
    }
    let outcome = match cli.command {
        None => canonical(&CanonicalArgs::default(), &stop),
        Some(Command::Canonical(args)) => canonical(&args, &stop),
        Some(Command::Run(args)) => run_one(&args, &stop),
        Some(Command::Compare(args)) => compare_all(&args, &stop),
        Some(Command::Sweep(args)) => sweep_rates(&args, &stop),
        Some(Command::Diff { before, after }) => diff(&before, &after),
        Some(Command::Report { json, html }) => Report::read(&json).and_then(|report| write_page(&report, &html)),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(match error {
                BenchError::Target(_) | BenchError::Peer(_) | BenchError::Load(_) => 5,
                _ => 2,
            })
        }
    }
}

fn connector(args: &cli::TargetArgs) -> Box<dyn Connector> {
    let tls = args.ca.as_ref().map(|ca| TlsFiles {
        ca: ca.clone(),
        identity: args.cert.clone().zip(args.key.clone()),
        server_name: args.server_name.clone(),
    });
    let addr = args.addr.clone();
    match args.target {
        TargetKind::Redis => Box::new(RespConnector {
            addr,
            tls,
            cluster: args.cluster,
        }),
        TargetKind::Memcached => Box::new(MemcachedConnector { addr, tls }),
        TargetKind::Generation => Box::new(GenerationConnector {
            config: args.config.clone(),
        }),
    }
}

/// The progress line on the terminal.
struct Screen {
    bar: ProgressBar,
    step: String,
}

impl Screen {
    fn new(quiet: bool) -> Self {
        let bar = if quiet || !std::io::stderr().is_terminal() {
            ProgressBar::hidden()
        } else {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed} {msg}") {
                bar.set_style(style);
            }
            bar
        };
        Self {
            bar,
            step: String::new(),
        }
    }
}

impl Observer for Screen {
    fn step(&mut self, text: &str) {
        text.clone_into(&mut self.step);
        self.bar.set_message(self.step.clone());
        self.bar.tick();
    }

    fn progress(&mut self, progress: Progress) {
        self.bar.set_message(format!(
            "{}  {:.0}/{:.0} s  {} ops/s  p99 {}  errors {}",
            self.step,
            progress.elapsed_s,
            progress.planned_s,
            table::short(progress.rate_per_s),
            table::time(progress.p99_ns as f64 / 1e3),
            progress.failed,
        ));
        self.bar.tick();
    }

    fn row(&mut self, servers: &[String], row: &RowResult) {
        self.bar.suspend(|| println!("{}", table::row(servers, row)));
    }
}

/// Loads what the workload reads, unless asked not to.
fn prepare(
    connector: &dyn Connector,
    spec: &WorkloadSpec,
    settings: &RunSettings,
    stop: &AtomicBool,
    screen: &mut Screen,
) -> Result<(), BenchError> {
    let keys = spec.key_count(spec.load_trace()?.as_deref());
    screen.step(&format!("loading {keys} keys"));
    compare::load_keys(
        connector,
        &WorkloadSpec { keys, ..spec.clone() },
        &settings.client_cpus,
        stop,
    )
}

fn run_one(args: &RunArgs, stop: &AtomicBool) -> Result<ExitCode, BenchError> {
    let environment = Environment::capture();
    let (spec, settings) = (args.workload.spec(), args.load.settings());
    let connector = connector(&args.target);
    spec.validate()?;
    settings.validate().map_err(BenchError::Settings)?;
    let mut screen = Screen::new(args.output.quiet);
    if !args.no_load && !spec.refill {
        prepare(&*connector, &spec, &settings, stop, &mut screen)?;
    }
    let probe = ProcessProbe {
        pids: args.target.server_pid.clone(),
    };
    let probe = (!probe.pids.is_empty()).then_some(&probe as &dyn Probe);
    let result = measure(&*connector, &spec, &settings, probe, stop, &mut screen)?;
    let code = exit_code(&result);
    if let Some(path) = &args.output.hdr_log {
        hdr_log::write(path, &result, environment.unix_time_s)?;
    }
    write_report(
        &Report::Runs {
            format: FORMAT,
            environment: Box::new(environment),
            runs: vec![result],
        },
        &args.output,
    )?;
    Ok(code)
}

fn measure(
    connector: &dyn Connector,
    spec: &WorkloadSpec,
    settings: &RunSettings,
    probe: Option<&dyn Probe>,
    stop: &AtomicBool,
    screen: &mut Screen,
) -> Result<RunResult, BenchError> {
    screen.step(&connector.name());
    let context = RunContext {
        stop,
        probe,
        progress: &mut |progress| screen.progress(progress),
    };
    let result = run(connector, spec, settings, context)?;
    screen.bar.finish_and_clear();
    print!("{}", table::run(&result));
    Ok(result)
}

fn exit_code(result: &RunResult) -> ExitCode {
    ExitCode::from(if result.error.is_some() {
        5
    } else {
        u8::from(!result.valid)
    })
}

fn write_report(report: &Report, output: &OutputArgs) -> Result<(), BenchError> {
    if let Some(path) = &output.json {
        report.write(path)?;
    }
    if let Some(path) = &output.report {
        write_page(report, path)?;
    }
    Ok(())
}

fn write_page(report: &Report, path: &Path) -> Result<ExitCode, BenchError> {
    let failed = |message: String| BenchError::Report {
        path: path.display().to_string(),
        message,
    };
    let page = html::render(report).map_err(failed)?;
    std::fs::write(path, page).map_err(|error| failed(error.to_string()))?;
    Ok(ExitCode::SUCCESS)
}

fn diff(before: &Path, after: &Path) -> Result<ExitCode, BenchError> {
    let text = differences::diff(&Report::read(before)?, &Report::read(after)?).map_err(BenchError::Settings)?;
    print!("{text}");
    Ok(ExitCode::SUCCESS)
}

fn canonical(args: &CanonicalArgs, stop: &AtomicBool) -> Result<ExitCode, BenchError> {
    let mut environment = Environment::capture();
    let (server_cpus, client_cpus) = disjoint_cpus(&[], &[]);
    let spec = WorkloadSpec {
        mix: "get=90,put=10".parse::<Mix>().map_err(BenchError::Settings)?,
        distribution: KeyDistribution::Zipf { theta: 0.99 },
        ..WorkloadSpec::default()
    };
    let settings = RunSettings {
        mode: Mode::Open {
            rate_per_s: 50_000.0,
            arrival: Arrival::Poisson,
        },
        spin: !client_cpus.is_empty(),
        client_cpus,
        ..RunSettings::default()
    };
    let mut screen = Screen::new(false);
    screen.step("starting generation");
    let server = Server::start_generation(&DevSettings {
        program: generation_program(args.generation_bin.as_deref())?,
        memory_mib: 1_024,
        cpus: server_cpus,
        arguments: Vec::new(),
    })?;
    environment
        .versions
        .insert(server.name().to_owned(), server.version().to_owned());
    prepare(server.connector(), &spec, &settings, stop, &mut screen)?;
    let result = measure(
        server.connector(),
        &spec,
        &settings,
        Some(server.probe()),
        stop,
        &mut screen,
    )?;
    let code = exit_code(&result);
    let output = OutputArgs {
        json: args.json.clone(),
        report: args.report.clone(),
        hdr_log: None,
        quiet: false,
    };
    write_report(
        &Report::Runs {
            format: FORMAT,
            environment: Box::new(environment),
            runs: vec![result],
        },
        &output,
    )?;
    Ok(code)
}

fn sweep_rates(args: &SweepArgs, stop: &AtomicBool) -> Result<ExitCode, BenchError> {
    let environment = Environment::capture();
    let (spec, settings) = (args.workload.spec(), args.load.settings());
    let connector = connector(&args.target);
    spec.validate()?;
    settings.validate().map_err(BenchError::Settings)?;
    let search = SweepSettings {
        start_per_s: args.load.rate,
        max_per_s: args.max_rate.clamp(1.0, 1e9),
        bound_us: args.bound.as_secs_f64() * 1e6,
        precision: (args.precision / 100.0).clamp(0.001, 1.0),
        arrival: args.load.arrival,
    };
    let mut screen = Screen::new(args.output.quiet);
    if !args.no_load && !spec.refill {
        prepare(&*connector, &spec, &settings, stop, &mut screen)?;
    }
    screen.step(&connector.name());
    let bar = screen.bar.clone();
    let mut knee = None;
    let each = |result: &RunResult, verdict: Verdict| {
        let Mode::Open { rate_per_s, .. } = result.settings.mode else {
            return;
        };
        let word = match verdict {
            Verdict::Good => "good",
            Verdict::Bad => "over the bound",
            Verdict::GeneratorTooSlow => "the generator is too slow for this rate",
        };
        let (p50, p999) = (
            table::time(result.latency_us(0.5)),
            table::time(result.latency_us(0.999)),
        );
        bar.suspend(|| {
            println!(
                "{:>10}/s  p50 {p50:>10}  p99.9 {p999:>10}  failed {}  {word}",
                table::short(rate_per_s),
                result.failed()
            );
        });
        if verdict == Verdict::Good {
            knee = Some(rate_per_s);
        }
    };
    let runs = sweep(&*connector, &spec, &settings, &search, stop, each, &mut |progress| {
        screen.progress(progress);
    })?;
    screen.bar.finish_and_clear();
    let bound = table::time(search.bound_us);
    let lost = runs.iter().find_map(|run| run.error.clone());
    match (knee, &lost) {
        (_, Some(error)) => println!("*** ENDED EARLY: {error} ***"),
        (Some(rate), None) => println!(
            "{}: p99.9 stays under {bound} up to {} operations/s",
            connector.name(),
            table::short(rate)
        ),
        (None, None) => println!("{}: p99.9 is over {bound} at every rate tried", connector.name()),
    }
    write_report(
        &Report::Runs {
            format: FORMAT,
            environment: Box::new(environment),
            runs,
        },
        &args.output,
    )?;
    Ok(ExitCode::from(if lost.is_some() {
        5
    } else {
        u8::from(knee.is_none())
    }))
}

/// CPUs of servers and client: as given, else the first and the last where there are two, else not pinned.
fn disjoint_cpus(servers: &[usize], client: &[usize]) -> (Vec<usize>, Vec<usize>) {
    let cpus = system::allowed_cpus();
    match (servers, client, &cpus[..]) {
        ([], [], [first, .., last]) => (vec![*first], vec![*last]),
        _ => (servers.to_vec(), client.to_vec()),
    }
}

fn compare_all(args: &CompareArgs, stop: &AtomicBool) -> Result<ExitCode, BenchError> {
    let environment = Environment::capture();
    let (server_cpus, client_cpus) = disjoint_cpus(&args.server_cpus, &args.client_cpus);
    let settings = CompareSettings {
        rows: match args.scenario {
            Scenario::Footprint => Vec::new(),
            Scenario::Single if args.rows.is_empty() => Row::SINGLE.to_vec(),
            Scenario::Single => args.rows.clone(),
        },
        rounds: args.rounds.max(1),
        duration: cli::seconds(args.seconds),
        warmup: cli::seconds(args.warmup),
        workload: WorkloadSpec {
            keys: args.keys,
            value_size: args.value_size.clone(),
            distribution: args.distribution.clone(),
            ..WorkloadSpec::default()
        },
        client_cpus,
        server_cpus: server_cpus.clone(),
    };
    settings.workload.validate()?;
    let mut screen = Screen::new(args.output.quiet);
    let mut kinds: Vec<Kind> = Vec::new();
    for kind in args
        .peers
        .iter()
        .flat_map(|kind| kind.variants(args.scenario == Scenario::Single))
    {
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    let mut servers = Vec::new();
    if !args.without_generation {
        screen.step("starting generation");
        servers.push(Server::start_generation(&DevSettings {
            program: generation_program(args.generation_bin.as_deref())?,
            memory_mib: args.memory,
            cpus: server_cpus.clone(),
            arguments: args.generation_args.clone(),
        })?);
    }
    for kind in kinds {
        screen.step(&format!("starting {}", kind.name()));
        servers.push(Server::start(kind, &server_cpus, args.memory)?);
    }
    let comparison = compare::compare(&servers, settings, environment, stop, &mut screen);
    screen.bar.finish_and_clear();
    print!("{}", table::comparison(&comparison));
    let code = if comparison.error.is_some() { 5 } else { 0 };
    write_report(
        &Report::Comparison {
            format: FORMAT,
            comparison: Box::new(comparison),
        },
        &args.output,
    )?;
    Ok(ExitCode::from(code))
}
