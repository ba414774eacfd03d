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
use generation_bench::compare::{self, CompareSettings, Comparison, Observer, Row, RowResult};
use generation_bench::engine::{Mode, Progress, RunContext, RunSettings, run};
use generation_bench::peers::{DevSettings, Durability, Features, Kind, Server, generation_program};
use generation_bench::report::{FORMAT, Report, diff as differences, hdr_log, html, table};
use generation_bench::result::RunResult;
use generation_bench::scenario::{self, ScenarioSettings, Watch};
use generation_bench::schedule::Arrival;
use generation_bench::sweep::{SweepSettings, Verdict, conclusion, sweep};
use generation_bench::system::{self, Environment, Probe, ProcessProbe};
use generation_bench::target::Connector;
use generation_bench::target::etcd::EtcdConnector;
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
    let addrs = args.addrs();
    let addr = addrs[0].clone();
    match args.target {
        TargetKind::Etcd => Box::new(EtcdConnector { endpoints: addrs, tls }),
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

    fn row(&mut self, comparison: &Comparison, row: &RowResult) {
        self.bar.suspend(|| println!("{}", table::row(comparison, row)));
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
    print!("{}", table::machine(&environment));
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
    let mut progress = |progress| screen.progress(progress);
    let context = RunContext {
        probe,
        ..RunContext::plain(stop, &mut progress)
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
        name: "generation".to_owned(),
        program: generation_program(args.generation_bin.as_deref())?,
        nodes: 1,
        memory_mib: 1_024,
        cpus: server_cpus,
        // As a user gets it, on the disk that a user has.
        durability: None,
        files: Some(std::env::temp_dir()),
        arguments: Vec::new(),
    })?;
    server.describe(&mut environment);
    prepare(server.connector(), &spec, &settings, stop, &mut screen)?;
    let result = measure(
        server.connector(),
        &spec,
        &settings,
        Some(server.probe()),
        stop,
        &mut screen,
    )?;
    print!("{}", table::machine(&environment));
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
        min_per_s: SweepSettings::lowest(settings.duration.as_secs_f64()),
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
    let (mut knee, mut limit) = (None::<f64>, None::<(f64, Verdict)>);
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
        } else if limit.is_none_or(|(rate, _)| rate_per_s < rate) {
            limit = Some((rate_per_s, verdict));
        }
    };
    let runs = sweep(&*connector, &spec, &settings, &search, stop, each, &mut |progress| {
        screen.progress(progress);
    })?;
    screen.bar.finish_and_clear();
    let bound = table::time(search.bound_us);
    let lost = runs.iter().find_map(|run| run.error.clone());
    if let Some(error) = &lost {
        println!("*** ENDED EARLY: {error} ***");
    } else {
        let knee = knee.map(table::short);
        let limit = limit.map(|(_, verdict)| verdict);
        println!("{}", conclusion(&connector.name(), &bound, knee.as_deref(), limit));
    }
    print!("{}", table::machine(&environment));
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

/// The kinds of peers that a comparison measures, each once.
fn peers(args: &CompareArgs) -> Result<Vec<Kind>, BenchError> {
    let named = if args.peers.is_empty() {
        let mut usual = args.scenario.default_peers();
        if args.without_generation || !Features::of(&generation_program(args.generation_bin.as_deref())?)?.durability {
            usual.retain(|kind| kind.durability().is_none());
        }
        usual
    } else {
        args.peers.clone()
    };
    let mut kinds: Vec<Kind> = Vec::new();
    for kind in named
        .iter()
        .flat_map(|kind| kind.variants(args.scenario == Scenario::Single))
    {
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    Ok(kinds)
}

fn start_generation(
    args: &CompareArgs,
    name: &str,
    durability: Durability,
    cpus: &[usize],
) -> Result<Server, BenchError> {
    Ok(Server::start_generation(&DevSettings {
        name: name.to_owned(),
        program: generation_program(args.generation_bin.as_deref())?,
        nodes: args.scenario.nodes(),
        memory_mib: args.memory,
        cpus: cpus.to_vec(),
        durability: Some(durability),
        files: args.files.clone(),
        arguments: args.generation_args.clone(),
    })?)
}

/// Starts one server of a comparison (`None`: generation, the baseline).
fn start(args: &CompareArgs, kind: Option<Kind>, cpus: &[usize]) -> Result<Server, BenchError> {
    let files = args.files.as_deref();
    let usual = args.durability.unwrap_or(args.scenario.default_durability());
    let Some(kind) = kind else {
        return start_generation(args, "generation", usual, cpus);
    };
    Ok(match kind.durability() {
        Some(durability) => start_generation(args, kind.name(), durability, cpus)?,
        None if args.scenario.nodes() > 1 => Server::start_replicated(kind, cpus, files)?,
        None => Server::start(kind, cpus, args.memory, files)?,
    })
}

fn compare_all(args: &CompareArgs, stop: &AtomicBool) -> Result<ExitCode, BenchError> {
    let workload = WorkloadSpec {
        keys: args.keys,
        value_size: args.value_size.clone(),
        distribution: args.distribution.clone(),
        mix: args.mix,
        ..WorkloadSpec::default()
    };
    workload.validate()?;
    let kinds = peers(args)?;
    Kind::check_installed(&kinds)?;
    if matches!(args.scenario, Scenario::Snapshot | Scenario::Failover) {
        return act_all(args, &workload, &kinds, stop);
    }
    let environment = Environment::capture();
    let (server_cpus, client_cpus) = disjoint_cpus(&args.server_cpus, &args.client_cpus);
    let rows = match args.scenario {
        Scenario::Footprint => Vec::new(),
        _ if !args.rows.is_empty() => args.rows.clone(),
        Scenario::Replicated => Row::REPLICATED.to_vec(),
        _ => Row::SINGLE.to_vec(),
    };
    let settings = CompareSettings {
        rows,
        rounds: args.rounds.max(1),
        duration: cli::seconds(args.seconds.unwrap_or(args.scenario.default_seconds())),
        warmup: cli::seconds(args.warmup),
        workload,
        client_cpus,
        server_cpus: server_cpus.clone(),
        read_back: args.scenario == Scenario::Footprint,
    };
    let mut screen = Screen::new(args.output.quiet);
    let mut servers = Vec::new();
    let baseline = (!args.without_generation).then_some(None);
    for kind in baseline.into_iter().chain(kinds.into_iter().map(Some)) {
        screen.step(&format!("starting {}", kind.map_or("generation", Kind::name)));
        servers.push(start(args, kind, &server_cpus)?);
    }
    let runs = settings.runs(servers.len());
    if runs > 0 && !args.output.quiet {
        let seconds = settings.time_of(runs).as_secs();
        screen.bar.suspend(|| {
            eprintln!(
                "{} rows x {} rounds x {} servers and the first again: {runs} runs, about {} min {} s and the loading",
                settings.rows.len(),
                settings.rounds,
                servers.len(),
                seconds / 60,
                seconds % 60
            );
        });
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

/// The scenarios in which something happens to the server: one server after the other, each alone on the machine.
fn act_all(
    args: &CompareArgs,
    workload: &WorkloadSpec,
    kinds: &[Kind],
    stop: &AtomicBool,
) -> Result<ExitCode, BenchError> {
    let mut environment = Environment::capture();
    let (server_cpus, client_cpus) = disjoint_cpus(&args.server_cpus, &args.client_cpus);
    let settings = ScenarioSettings {
        workload: workload.clone(),
        rate_per_s: args.rate.unwrap_or(args.scenario.default_rate()),
        connections: 8,
        duration: cli::seconds(args.seconds.unwrap_or(args.scenario.default_seconds())),
        warmup: cli::seconds(args.warmup),
        client_cpus,
    };
    let mut screen = Screen::new(args.output.quiet);
    let generation = (!args.without_generation).then_some(None);
    let mut runs = Vec::new();
    let mut failed = None;
    for kind in generation.into_iter().chain(kinds.iter().copied().map(Some)) {
        if stop.load(std::sync::atomic::Ordering::Relaxed) {
            break;
        }
        match act(args, kind, &server_cpus, &settings, &mut environment, stop, &mut screen) {
            Ok(result) => {
                screen.bar.suspend(|| println!("{}", table::run(&result)));
                runs.push(result);
            }
            // The servers before it are worth a report all the same.
            Err(error) => {
                failed = Some(error);
                break;
            }
        }
    }
    screen.bar.finish_and_clear();
    if !runs.is_empty() {
        print!("{}{}", table::findings(&runs), table::machine(&environment));
        let report = Report::Runs {
            format: FORMAT,
            environment: Box::new(environment),
            runs: runs.clone(),
        };
        write_report(&report, &args.output)?;
    }
    match failed {
        Some(error) => Err(error),
        None => Ok(runs
            .iter()
            .map(exit_code)
            .find(|code| *code != ExitCode::SUCCESS)
            .unwrap_or(ExitCode::SUCCESS)),
    }
}

/// Starts one server (`None`: generation) and lets the scenario happen to it.
fn act(
    args: &CompareArgs,
    kind: Option<Kind>,
    cpus: &[usize],
    settings: &ScenarioSettings,
    environment: &mut Environment,
    stop: &AtomicBool,
    screen: &mut Screen,
) -> Result<RunResult, BenchError> {
    screen.step(&format!("starting {}", kind.map_or("generation", Kind::name)));
    let server = start(args, kind, cpus)?;
    server.describe(environment);
    if args.scenario == Scenario::Snapshot {
        server.can_snapshot()?;
        screen.step(&format!(
            "loading {} keys into {}",
            settings.workload.keys,
            server.name()
        ));
        compare::load_keys(server.connector(), &settings.workload, &settings.client_cpus, stop)?;
    }
    screen.step(server.name());
    let mut progress = |progress| screen.progress(progress);
    let mut watch = Watch {
        stop,
        progress: &mut progress,
    };
    match args.scenario {
        Scenario::Snapshot => scenario::snapshot(&server, settings, &mut watch),
        _ => scenario::failover(&server, settings, &mut watch),
    }
}
