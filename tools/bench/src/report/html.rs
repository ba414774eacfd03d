//! One self-contained page: latency by percentile, latency and rate over time with an event line, and the
//! figures as tables. Charts are inline SVG; nothing is loaded from anywhere, nothing runs.

use std::fmt::Write as _;

use hdrhistogram::Histogram;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::Report;
use super::table::{self, figure, short, time};
use crate::compare::{Comparison, Metric, RowResult};
use crate::engine::{merge_histogram, new_histogram};
use crate::result::{ClassResult, Event, RunResult};
use crate::system::Environment;

/// Width and height of a chart in pixels of its view box.
const SIZE: (u32, u32) = (900, 380);
/// Colours of the curves: distinguishable without red against green (Okabe and Ito).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(213, 94, 0),
    RGBColor(86, 180, 233),
    RGBColor(80, 80, 80),
];
const FONT: &str = "sans-serif";
/// Share of a chart's height that labels of events may take.
const LABELS: f64 = 0.2;

/// A named line of points; one that is not a number is a gap.
struct Curve {
    name: String,
    points: Vec<(f64, f64)>,
}

/// A table of a page, with a heading.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// The heading.
    pub title: String,
    /// Names of the columns.
    pub header: Vec<String>,
    /// The rows, as many cells each.
    pub rows: Vec<Vec<String>>,
}

/// Renders a report under a title of its own, with tables in front of its runs.
///
/// # Errors
/// What the plotting crate says of a chart it cannot draw.
pub fn render_with(report: &Report, title: &str, sections: &[Section]) -> Result<String, String> {
    let mut body = String::new();
    for Section { title, header, rows } in sections {
        let _ = write!(body, "<h2>{}</h2><table><tr>", escape(title));
        for name in header {
            let _ = write!(body, "<th>{}</th>", escape(name));
        }
        body.push_str("</tr>");
        for row in rows {
            body.push_str("<tr>");
            for cell in row {
                let _ = write!(body, "<td>{}</td>", escape(cell));
            }
            body.push_str("</tr>");
        }
        body.push_str("</table>");
    }
    match report {
        Report::Runs { environment, runs, .. } => {
            body.push_str(&of_all(runs)?);
            Ok(page(&escape(title), environment, &body))
        }
        Report::Comparison { .. } => Err("a comparison has a page of its own".to_owned()),
    }
}

/// What a page says of runs.
fn of_all(runs: &[RunResult]) -> Result<String, String> {
    let mut body = String::new();
    for run in runs {
        let _ = write!(
            body,
            "<h2>{}</h2><p>{}</p>",
            escape(&run.target),
            escape(&table::headline(run))
        );
        verdict(&mut body, run);
        figures(&mut body, run);
    }
    if !runs.is_empty() {
        let _ = write!(body, "<h2>Latency by percentile</h2>{}", by_percentile(&of_runs(runs))?);
    }
    for run in runs {
        let _ = write!(body, "<h2>Over time: {}</h2>{}", escape(&label(run)), over_time(run)?);
    }
    Ok(body)
}

/// Renders a report.
///
/// # Errors
/// What the plotting crate says of a chart it cannot draw.
pub fn render(report: &Report) -> Result<String, String> {
    match report {
        Report::Runs { environment, runs, .. } => {
            let body = of_all(runs)?;
            Ok(page("Latency report", environment, &body))
        }
        Report::Comparison { comparison, .. } => {
            let mut body = String::new();
            for row in &comparison.rows {
                let _ = write!(
                    body,
                    "<h2>{}</h2><p>{} connection(s), closed loop, batches of {} written at once, {} round(s)</p>",
                    row.row,
                    row.row.connections,
                    row.row.depth,
                    row.rounds.len()
                );
                comparison_figures(&mut body, comparison, row);
                body.push_str(&by_percentile(&of_row(comparison, row))?);
            }
            body.push_str("<h2>How to read it</h2>");
            for line in table::legend(comparison).lines() {
                let _ = write!(body, "<p class=\"small\">{}</p>", escape(line));
            }
            for line in table::ending(comparison).lines() {
                let _ = write!(body, "<p class=\"bad\">{}</p>", escape(line.trim_matches(['*', ' '])));
            }
            Ok(page("Comparison", &comparison.environment, &body))
        }
    }
}

/// The distributions of runs, a curve a class of operations.
fn of_runs(runs: &[RunResult]) -> Vec<(String, Histogram<u64>)> {
    let of_run = |run: &RunResult| {
        let name = |class: &ClassResult| {
            if run.classes.len() > 1 {
                format!("{} {}", label(run), class.class.name())
            } else {
                label(run)
            }
        };
        let classes = run.classes.iter();
        classes
            .filter_map(|class| Some((name(class), class.latency.histogram()?)))
            .collect::<Vec<_>>()
    };
    runs.iter().flat_map(of_run).collect()
}

/// The distributions of a row, a curve a server, all its rounds together; the baseline's second runs too.
fn of_row(comparison: &Comparison, row: &RowResult) -> Vec<(String, Histogram<u64>)> {
    let of_server = |index: usize| {
        let mut all = new_histogram();
        for round in &row.rounds {
            let again = round
                .last()
                .filter(|_| index == 0 && round.len() > comparison.servers.len());
            for run in round.get(index).into_iter().chain(again) {
                merge_histogram(&mut all, &run.latency());
            }
        }
        all
    };
    let names = comparison.servers.iter().enumerate();
    names.map(|(index, name)| (name.clone(), of_server(index))).collect()
}

fn label(run: &RunResult) -> String {
    match run.settings.mode {
        crate::engine::Mode::Open { rate_per_s, .. } => format!("{} at {}/s", run.target, short(rate_per_s)),
        crate::engine::Mode::Closed { .. } => run.target.clone(),
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// A time at a tick of an axis: whole decades need no decimals.
fn tick(us: f64) -> String {
    let (value, unit) = match us {
        us if us >= 1e6 => (us / 1e6, "s"),
        us if us >= 1e3 => (us / 1e3, "ms"),
        us => (us, "µs"),
    };
    // Rounded to what is shown at most, and shown without zeros at the end.
    format!("{} {unit}", (value * 100.0).round() / 100.0)
}

/// A rate at a tick of an axis.
fn round_number(value: f64) -> String {
    let (value, unit) = match value {
        value if value >= 1e6 => (value / 1e6, " M"),
        value if value >= 1e3 => (value / 1e3, " k"),
        value => (value, ""),
    };
    format!("{}{unit}", (value * 100.0).round() / 100.0)
}

fn verdict(body: &mut String, run: &RunResult) {
    for reason in run.invalid.iter().chain(&run.error) {
        let _ = write!(body, "<p class=\"bad\">Not to be used: {}</p>", escape(reason));
    }
}

fn figures(body: &mut String, run: &RunResult) {
    body.push_str("<table><tr><th></th><th>count</th><th>mean</th><th>p50</th><th>p90</th><th>p99</th><th>p99.9</th><th>p99.99</th><th>max</th></tr>");
    for class in &run.classes {
        for (name, times) in [(class.class.name(), &class.latency), ("service time", &class.service)] {
            let _ = write!(body, "<tr><td>{name}</td><td>{}</td>", times.count);
            for us in [
                times.mean_us,
                times.p50_us,
                times.p90_us,
                times.p99_us,
                times.p99_9_us,
                times.p99_99_us,
                times.max_us,
            ] {
                let _ = write!(body, "<td>{}</td>", time(us));
            }
            body.push_str("</tr>");
        }
    }
    let _ = write!(body, "</table><p>{}</p>", escape(&table::yielded(run)));
    if !run.findings.is_empty() {
        body.push_str("<table>");
        for finding in &run.findings {
            let _ = write!(
                body,
                "<tr><td>{}</td><td>{}</td></tr>",
                escape(&finding.name),
                figure(finding)
            );
        }
        body.push_str("</table>");
    }
}

fn comparison_figures(body: &mut String, comparison: &Comparison, row: &RowResult) {
    body.push_str(
        "<table><tr><th></th><th>server CPU/op</th><th>operations/s</th><th>p50</th><th>p99</th><th>p99.9</th></tr>",
    );
    for (index, server) in comparison.servers.iter().enumerate() {
        let _ = write!(body, "<tr><td>{}</td>", escape(server));
        for metric in Metric::ALL {
            let _ = write!(
                body,
                "<td>{}<br><span class=\"small\">{}</span></td>",
                escape(&table::value(comparison, row, index, metric)),
                escape(&table::against(row, index, metric)),
            );
        }
        body.push_str("</tr>");
    }
    body.push_str("</table>");
    for remark in row.remarks_on(&comparison.servers, comparison.settings.server_cpus.len()) {
        let _ = write!(body, "<p class=\"small\">{}</p>", escape(&remark));
    }
}

/// Latency by percentile, the axis stretched towards 100 % (1 / (1 - q), logarithmic), as HDR plots do.
fn by_percentile(distributions: &[(String, Histogram<u64>)]) -> Result<String, String> {
    let curves: Vec<_> = distributions
        .iter()
        .map(|(name, histogram)| {
            let points = histogram
                .iter_quantiles(5)
                .map(|step| (step.quantile_iterated_to(), step.value_iterated_to()))
                .filter(|(quantile, _)| *quantile < 1.0)
                .map(|(quantile, ns)| (1.0 / (1.0 - quantile), ns as f64 / 1e3))
                .collect();
            Curve {
                name: name.clone(),
                points,
            }
        })
        .collect();
    let right = curves
        .iter()
        .filter_map(|curve| curve.points.last())
        .map(|point| point.0)
        .fold(100.0, f64::max);
    svg(&curves, |area| {
        let (low, high) = bounds(&curves);
        let mut chart = ChartBuilder::on(area)
            .margin(12)
            .margin_right(44)
            .x_label_area_size(40)
            .y_label_area_size(76)
            .build_cartesian_2d((1.0..right).log_scale(), (low..high).log_scale())
            .map_err(|error| error.to_string())?;
        chart
            .configure_mesh()
            .x_desc("percentile")
            .y_desc("latency")
            .x_label_formatter(&|x| percentile_label(*x))
            .y_label_formatter(&|y| tick(*y))
            .bold_line_style(RGBColor(215, 215, 215))
            .light_line_style(RGBColor(242, 242, 242))
            .label_style((FONT, 13))
            .axis_desc_style((FONT, 14))
            .draw()
            .map_err(|error| error.to_string())?;
        draw_curves(&mut chart, &curves)
    })
}

#[allow(clippy::cast_sign_loss, reason = "clamped to 3 to 12")]
fn percentile_label(x: f64) -> String {
    let nines = x.log10().round();
    if (x / 10_f64.powf(nines) - 1.0).abs() > 1e-6 {
        return String::new();
    }
    match nines {
        n if n < 0.5 => "0 %".to_owned(),
        n if n < 1.5 => "90 %".to_owned(),
        n if n < 2.5 => "99 %".to_owned(),
        n => format!("{:.*} %", n.clamp(3.0, 12.0) as usize - 2, 100.0 - 100.0 / x),
    }
}

/// Latency and rate by interval, with the events as vertical lines.
fn over_time(run: &RunResult) -> Result<String, String> {
    let curve = |name: &str, of: &dyn Fn(&crate::result::IntervalResult) -> f64| Curve {
        name: name.to_owned(),
        points: run
            .intervals
            .iter()
            .map(|interval| {
                let value = if interval.latency.count > 0 {
                    of(interval)
                } else {
                    f64::NAN
                };
                (interval.start_s + interval.length_s / 2.0, value)
            })
            .collect(),
    };
    let latencies = [
        curve("p50", &|interval| interval.latency.p50_us),
        curve("p99", &|interval| interval.latency.p99_us),
        curve("p99.9", &|interval| interval.latency.p99_9_us),
        curve("max", &|interval| interval.latency.max_us),
    ];
    let end_s = run
        .intervals
        .last()
        .map_or(1.0, |last| last.start_s + last.length_s)
        .max(run.measured_s);
    let latency = svg(&latencies, |area| {
        let (low, mut high) = bounds(&latencies);
        if !run.events.is_empty() {
            // Room for the labels above the curves.
            high *= (high / low).powf(LABELS);
        }
        let mut chart = ChartBuilder::on(area)
            .margin(12)
            .margin_right(44)
            .x_label_area_size(40)
            .y_label_area_size(76)
            .build_cartesian_2d(0.0..end_s, (low..high).log_scale())
            .map_err(|error| error.to_string())?;
        chart
            .configure_mesh()
            .x_desc("seconds")
            .y_desc("latency")
            .y_label_formatter(&|y| tick(*y))
            .bold_line_style(RGBColor(215, 215, 215))
            .light_line_style(RGBColor(242, 242, 242))
            .x_max_light_lines(0)
            .label_style((FONT, 13))
            .axis_desc_style((FONT, 14))
            .draw()
            .map_err(|error| error.to_string())?;
        draw_curves(&mut chart, &latencies)?;
        draw_events(&mut chart, &run.events, end_s, |share| low * (high / low).powf(share))
    })?;
    // An interval without a reply is a rate of zero, not a gap in the line.
    let rate_curve = |name: &str, of: &dyn Fn(&crate::result::IntervalResult) -> f64| Curve {
        name: name.to_owned(),
        points: run
            .intervals
            .iter()
            .filter(|interval| interval.start_s + interval.length_s <= end_s + 1e-6)
            .map(|interval| (interval.start_s + interval.length_s / 2.0, of(interval)))
            .collect(),
    };
    let mut rates = vec![rate_curve("operations/s", &|interval| interval.rate_per_s)];
    if run.failed() > 0 {
        rates.push(rate_curve("failed/s", &|interval| {
            interval.failed as f64 / interval.length_s
        }));
    }
    let rate = svg(&rates, |area| {
        let values = rates.iter().flat_map(|curve| &curve.points).map(|point| point.1);
        let high = values.fold(1.0, f64::max) * (1.1 + LABELS);
        let mut chart = ChartBuilder::on(area)
            .margin(12)
            .margin_right(44)
            .x_label_area_size(40)
            .y_label_area_size(76)
            .build_cartesian_2d(0.0..end_s, 0.0..high)
            .map_err(|error| error.to_string())?;
        chart
            .configure_mesh()
            .x_desc("seconds")
            .y_desc("operations/s")
            .y_label_formatter(&|y| round_number(*y))
            .bold_line_style(RGBColor(215, 215, 215))
            .light_line_style(RGBColor(242, 242, 242))
            .max_light_lines(0)
            .label_style((FONT, 13))
            .axis_desc_style((FONT, 14))
            .draw()
            .map_err(|error| error.to_string())?;
        draw_curves(&mut chart, &rates)?;
        draw_events(&mut chart, &run.events, end_s, |share| high * share)
    })?;
    Ok(latency + &rate)
}

/// A vertical line with a label for each event; `height` gives the value at a share of the chart's height.
fn draw_events<'a, 'b: 'a, X, Y>(
    chart: &mut ChartContext<'a, SVGBackend<'b>, Cartesian2d<X, Y>>,
    events: &[Event],
    end_s: f64,
    height: impl Fn(f64) -> f64,
) -> Result<(), String>
where
    X: plotters::coord::ranged1d::Ranged<ValueType = f64>,
    Y: plotters::coord::ranged1d::Ranged<ValueType = f64>,
{
    // Labels of neighbouring events stand one below the other.
    const ROWS: usize = 5;
    for (index, Event { at_s, text }) in events.iter().enumerate() {
        if !(0.0..=end_s).contains(at_s) {
            continue;
        }
        let line = LineSeries::new([(*at_s, height(0.0)), (*at_s, height(1.0))], BLACK.mix(0.6));
        chart.draw_series(line).map_err(|error| error.to_string())?;
        // A label near the right edge stands left of its line.
        let (label, side) = if *at_s > end_s * 0.75 {
            (format!("{text}\u{a0}"), HPos::Right)
        } else {
            (format!("\u{a0}{text}"), HPos::Left)
        };
        let style = (FONT, 13).into_font().color(&BLACK).pos(Pos::new(side, VPos::Top));
        let at = (*at_s, height(0.98 - 0.06 * (index % ROWS) as f64));
        chart
            .draw_series(std::iter::once(Text::new(label, at, style)))
            .map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// Bounds of a logarithmic axis that holds every point, in whole decades.
fn bounds(curves: &[Curve]) -> (f64, f64) {
    let values = || {
        curves
            .iter()
            .flat_map(|curve| &curve.points)
            .map(|point| point.1)
            .filter(|value| *value > 0.0)
    };
    let low = values().fold(f64::INFINITY, f64::min);
    let high = values().fold(0.0, f64::max);
    if high <= 0.0 {
        return (1.0, 1_000.0);
    }
    let (low, high) = (10_f64.powf(low.log10().floor()), 10_f64.powf(high.log10().ceil()));
    (low, high.max(low * 10.0))
}

fn draw_curves<'a, 'b: 'a, X, Y>(
    chart: &mut ChartContext<'a, SVGBackend<'b>, Cartesian2d<X, Y>>,
    curves: &[Curve],
) -> Result<(), String>
where
    X: plotters::coord::ranged1d::Ranged<ValueType = f64>,
    Y: plotters::coord::ranged1d::Ranged<ValueType = f64>,
{
    for (curve, colour) in curves.iter().zip(COLOURS.into_iter().cycle()) {
        for piece in curve.points.split(|point| point.1.is_nan()) {
            let line = LineSeries::new(piece.iter().copied(), colour.stroke_width(2));
            // A point between two gaps is no line.
            let line = line.point_size(u32::from(piece.len() == 1) * 2);
            chart.draw_series(line).map_err(|error| error.to_string())?;
        }
    }
    Ok(())
}

/// Draws one chart and returns it as an element that scales with the page. The legend stands above it, where it covers no curve.
fn svg(
    curves: &[Curve],
    draw: impl FnOnce(&DrawingArea<SVGBackend<'_>, Shift>) -> Result<(), String>,
) -> Result<String, String> {
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        area.fill(&WHITE).map_err(|error| error.to_string())?;
        draw(&area)?;
        area.present().map_err(|error| error.to_string())?;
    }
    let mut legend = String::new();
    for (curve, RGBColor(red, green, blue)) in curves.iter().zip(COLOURS.into_iter().cycle()) {
        let _ = write!(
            legend,
            "<span><i style=\"background:rgb({red},{green},{blue})\"></i>{}</span> ",
            escape(&curve.name)
        );
    }
    Ok(format!("<figure><figcaption>{legend}</figcaption>{text}</figure>"))
}

fn page(title: &str, environment: &Environment, body: &str) -> String {
    let versions: Vec<_> = environment
        .versions
        .iter()
        .map(|(name, version)| match environment.durability.get(name) {
            Some(durability) => format!("{name}: {version}; acknowledged writes: {durability}"),
            None => format!("{name}: {version}"),
        })
        .map(|line| escape(&line))
        .collect();
    let mut warnings = String::new();
    for warning in table::warnings(environment) {
        let _ = write!(warnings, "<p class=\"bad\">{}</p>", escape(warning));
    }
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>{title}</title><style>\
         body{{font:15px/1.5 system-ui,sans-serif;max-width:960px;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}}\
         table{{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}}\
         td,th{{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}}\
         td:first-child,th:first-child{{text-align:left}}figure{{margin:1rem 0}}svg{{width:100%;height:auto}}\
         figcaption{{padding-left:84px;font-size:13px}}figcaption span{{margin-right:1.2rem;white-space:nowrap}}\
         figcaption i{{display:inline-block;width:18px;height:3px;margin-right:.4rem;vertical-align:middle}}\
         .bad{{color:#b00;font-weight:600}}.small{{color:#666;font-size:13px}}</style></head><body>\
         <h1>{title}</h1><p class=\"small\">{} × {}{}, Linux {}, load before {:.2}<br>{}<br><code>{}</code></p>{warnings}{body}</body></html>\n",
        environment.cpus,
        escape(&environment.cpu),
        if environment.virtual_machine { " (virtual)" } else { "" },
        escape(&environment.kernel),
        environment.load_before[0],
        versions.join("<br>"),
        escape(&environment.command.join(" ")),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_labelled_at_the_nines_only() {
        assert_eq!(percentile_label(1.0), "0 %");
        assert_eq!(percentile_label(10.0), "90 %");
        assert_eq!(percentile_label(100.0), "99 %");
        assert_eq!(percentile_label(10_000.0), "99.99 %");
        assert_eq!(percentile_label(20.0), "");
    }

    #[test]
    fn ticks_have_no_zeros_at_the_end() {
        assert_eq!(tick(10.0), "10 µs");
        assert_eq!(tick(100_000.0), "100 ms");
        assert_eq!(tick(1_500.0), "1.5 ms");
        assert_eq!(tick(0.1), "0.1 µs");
        assert_eq!(round_number(0.0), "0");
        assert_eq!(round_number(20_000.0), "20 k");
    }

    #[test]
    fn markup_in_names_is_text() {
        assert_eq!(escape("<a&b>\""), "&lt;a&amp;b&gt;&quot;");
    }
}
