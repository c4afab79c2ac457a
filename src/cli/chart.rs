//! Curves over steps: an SVG picture and a few lines of text for the terminal.

use std::path::Path;

use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use crate::error::{Error, Result};

/// One named curve.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// As in the legend.
    pub name: String,
    /// (step, value); values that are not finite, or not positive on a logarithmic axis, break the line.
    pub points: Vec<(f64, f64)>,
}

/// Curves that share their axes.
#[derive(Clone, Debug, PartialEq)]
pub struct Panel {
    /// Above the curves.
    pub title: String,
    /// Beside the vertical axis.
    pub unit: String,
    /// Logarithmic vertical axis.
    pub log: bool,
    /// Drawn in order, later ones on top.
    pub series: Vec<Series>,
}

const WIDTH: u32 = 960;
const TITLE_HEIGHT: u32 = 48;
const PANEL_HEIGHT: u32 = 360;

/// Okabe and Ito's colours, which colour-blind readers can tell apart.
const COLORS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];

impl Panel {
    /// The vertical coordinate drawn for `value`: its decimal logarithm on a logarithmic axis.
    fn height(&self, value: f64) -> Option<f64> {
        let height = if self.log { value.log10() } else { value };
        height.is_finite().then_some(height)
    }

    /// Runs of points without a break, in drawn coordinates.
    fn strokes(&self, series: &Series) -> Vec<Vec<(f64, f64)>> {
        let drawn = series.points.iter().map(|&(step, value)| Some((step, self.height(value)?)));
        let drawn: Vec<Option<(f64, f64)>> = drawn.collect();
        drawn.split(Option::is_none).filter(|run| !run.is_empty()).map(|run| run.iter().flatten().copied().collect()).collect()
    }

    /// Ranges of step and drawn height over all series, widened where they would be empty; none without a drawable point.
    fn bounds(&self) -> Option<[(f64, f64); 2]> {
        let points: Vec<(f64, f64)> = self.series.iter().flat_map(|series| self.strokes(series)).flatten().collect();
        let range = |values: &mut dyn Iterator<Item = f64>| {
            values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)))
        };
        if points.is_empty() {
            return None;
        }
        let (first, last) = range(&mut points.iter().map(|point| point.0));
        let (low, high) = range(&mut points.iter().map(|point| point.1));
        let margin = if high > low { (high - low) * 0.06 } else { (high.abs() * 0.1).max(0.1) };
        Some([(first, if last > first { last } else { first + 1.0 }), (low - margin, high + margin)])
    }
}

/// Draws `panels` below each other into an SVG file.
///
/// # Errors
/// No panel has a point, or the file cannot be written.
pub fn svg(path: &Path, title: &str, panels: &[Panel]) -> Result<()> {
    let mut shown: Vec<(&Panel, [(f64, f64); 2])> = panels.iter().filter_map(|panel| Some((panel, panel.bounds()?))).collect();
    if shown.is_empty() {
        return Err(Error::file(path, "has nothing to draw: no curve has a point").fix("train for some steps first"));
    }
    // One range of steps for all, so that panels can be compared by eye.
    let first = shown.iter().map(|(_, [steps, _])| steps.0).fold(f64::INFINITY, f64::min);
    let last = shown.iter().map(|(_, [steps, _])| steps.1).fold(f64::NEG_INFINITY, f64::max);
    shown.iter_mut().for_each(|(_, [steps, _])| *steps = (first, last));
    let mut text = String::new();
    let size = (WIDTH, TITLE_HEIGHT + PANEL_HEIGHT * shown.len() as u32);
    // Drawing into memory can only fail on our own mistakes; the message is passed on all the same.
    draw(&mut text, size, title, &shown).map_err(|error| Error::file(path, format!("cannot be drawn: {error}")))?;
    std::fs::write(path, text).map_err(Error::io("write", path))
}

type Drawn = Result<(), Box<dyn std::error::Error>>;

fn draw(text: &mut String, size: (u32, u32), title: &str, panels: &[(&Panel, [(f64, f64); 2])]) -> Drawn {
    let root = SVGBackend::with_string(text, size).into_drawing_area();
    root.fill(&WHITE)?;
    let (head, body) = root.split_vertically(TITLE_HEIGHT);
    head.titled(title, ("sans-serif", 26))?;
    for (area, (panel, bounds)) in body.split_evenly((panels.len(), 1)).iter().zip(panels) {
        draw_panel(area, panel, *bounds)?;
    }
    root.present()?;
    drop((head, body));
    Ok(())
}

fn draw_panel(area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>, panel: &Panel, [steps, heights]: [(f64, f64); 2]) -> Drawn {
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, ("sans-serif", 20))
        .margin(12)
        .margin_right(32)
        .set_label_area_size(LabelAreaPosition::Left, 76)
        .set_label_area_size(LabelAreaPosition::Bottom, 44)
        .build_cartesian_2d(steps.0..steps.1, heights.0..heights.1)?;
    let label = |height: &f64| number(if panel.log { 10f64.powf(*height) } else { *height });
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(BLACK.mix(0.12))
        .x_desc("step")
        .y_desc(&panel.unit)
        .x_label_formatter(&|step| number(*step))
        .y_label_formatter(&label)
        .label_style(("sans-serif", 16))
        .axis_desc_style(("sans-serif", 17))
        .draw()?;
    for (index, series) in panel.series.iter().enumerate() {
        draw_series(&mut chart, panel, series, COLORS[index % COLORS.len()])?;
    }
    chart
        .configure_series_labels()
        .position(legend_corner(panel, steps))
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .label_font(("sans-serif", 16))
        .draw()?;
    Ok(())
}

/// The upper corner with more room under the frame: curves that rise leave the left one free, those that fall the right one.
fn legend_corner(panel: &Panel, steps: (f64, f64)) -> SeriesLabelPosition {
    let third = (steps.1 - steps.0) / 3.0;
    let points: Vec<(f64, f64)> = panel.series.iter().flat_map(|series| panel.strokes(series)).flatten().collect();
    let highest =
        |inside: &dyn Fn(f64) -> bool| points.iter().filter(|point| inside(point.0)).map(|point| point.1).fold(f64::NEG_INFINITY, f64::max);
    let (left, right) = (highest(&|step| step < steps.0 + third), highest(&|step| step > steps.1 - third));
    if right > left { SeriesLabelPosition::UpperLeft } else { SeriesLabelPosition::UpperRight }
}

type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

fn draw_series(chart: &mut Chart<'_, '_>, panel: &Panel, series: &Series, color: RGBColor) -> Drawn {
    let mut labelled = false;
    for stroke in panel.strokes(series) {
        // A lone point has no line; few points are seen better with a mark each.
        if stroke.len() <= 24 {
            chart.draw_series(stroke.iter().map(|&point| Circle::new(point, 3, color.filled())))?;
        }
        let drawn = chart.draw_series(LineSeries::new(stroke, color.stroke_width(2)))?;
        if !labelled {
            drawn.label(&series.name).legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color.stroke_width(3)));
            labelled = true;
        }
    }
    Ok(())
}

/// A short number for an axis.
fn number(value: f64) -> String {
    let size = value.abs();
    if size != 0.0 && !(1e-3..1e6).contains(&size) {
        return format!("{value:.1e}");
    }
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// A line of at most `width` characters whose heights follow `values`; gaps for what is not finite.
pub fn sparkline(values: &[f64], width: usize) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let columns = resample(values, width);
    let known = || columns.iter().copied().flatten();
    let (low, high) = (known().fold(f64::INFINITY, f64::min), known().fold(f64::NEG_INFINITY, f64::max));
    let bar = |value: f64| BARS[level(value, low, high, BARS.len())];
    columns.iter().map(|column| column.map_or(' ', bar)).collect()
}

/// A plot of `height` lines of ASCII, with the highest and lowest value at the left; empty without a finite value.
pub fn ascii(values: &[f64], width: usize, height: usize) -> String {
    let columns = resample(values, width);
    let known = || columns.iter().copied().flatten();
    let (low, high) = (known().fold(f64::INFINITY, f64::min), known().fold(f64::NEG_INFINITY, f64::max));
    if low > high || height == 0 {
        return String::new();
    }
    let lines = (0..height).rev().map(|row| {
        let label = if row + 1 == height {
            number(high)
        } else if row == 0 {
            number(low)
        } else {
            String::new()
        };
        let marks: String =
            columns.iter().map(|column| if column.is_some_and(|v| level(v, low, high, height) == row) { '*' } else { ' ' }).collect();
        format!("{label:>10} |{}\n", marks.trim_end())
    });
    lines.collect()
}

/// Which of `levels` steps between `low` and `high` a value lies on.
fn level(value: f64, low: f64, high: f64, levels: usize) -> usize {
    if high <= low {
        return 0;
    }
    let share = (value - low) / (high - low) * (levels - 1) as f64;
    (share.round() as usize).min(levels - 1)
}

/// Means over at most `width` equal stretches; none for a stretch without a finite value.
fn resample(values: &[f64], width: usize) -> Vec<Option<f64>> {
    let columns = width.min(values.len());
    let stretch = |column: usize| &values[column * values.len() / columns..(column + 1) * values.len() / columns];
    let mean = |part: &[f64]| {
        let known: Vec<f64> = part.iter().copied().filter(|value| value.is_finite()).collect();
        (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64)
    };
    (0..columns).map(|column| mean(stretch(column))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(name: &str, points: &[(f64, f64)]) -> Series {
        Series { name: name.into(), points: points.to_vec() }
    }

    fn panel(log: bool, series: Vec<Series>) -> Panel {
        Panel { title: "Loss".into(), unit: "nats per token".into(), log, series }
    }

    #[test]
    fn a_picture_has_title_axes_legend_and_every_curve() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("run.svg");
        let curves = vec![series("loss", &[(0.0, 5.0), (100.0, 2.0)]), series("val <quantized>", &[(50.0, 3.0)])];
        svg(&path, "run & title", &[panel(false, curves), panel(true, vec![series("kurtosis", &[(1.0, 0.0), (2.0, 10.0)])])])
            .expect("draws");
        let text = std::fs::read_to_string(&path).expect("reads");
        for part in [
            "<svg",
            "run &amp; title",
            "nats per token",
            "step",
            "loss",
            "val &lt;quantized&gt;",
            "kurtosis",
            "#0072B2",
            "#D55E00",
            "</svg>",
        ] {
            assert!(text.contains(part), "{part} is missing");
        }
    }

    #[test]
    fn nothing_to_draw_is_said() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("run.svg");
        assert!(svg(&path, "t", &[panel(false, vec![series("loss", &[(1.0, f64::NAN)])])]).is_err());
        assert!(svg(&path, "t", &[]).is_err());
        assert!(!path.exists());
    }

    #[test]
    fn lines_break_where_a_value_cannot_be_drawn() {
        let curve = series("loss", &[(1.0, 1.0), (2.0, f64::NAN), (3.0, 100.0), (4.0, -1.0)]);
        assert_eq!(panel(true, vec![]).strokes(&curve), [vec![(1.0, 0.0)], vec![(3.0, 2.0)]]);
        assert_eq!(panel(false, vec![]).strokes(&curve), [vec![(1.0, 1.0)], vec![(3.0, 100.0), (4.0, -1.0)]]);
        assert_eq!(panel(false, vec![series("one", &[(5.0, 2.0)])]).bounds(), Some([(5.0, 6.0), (1.8, 2.2)]));
    }

    #[test]
    fn the_legend_keeps_clear_of_the_curves() {
        let rising = panel(false, vec![series("k", &[(0.0, 0.0), (9.0, 9.0)])]);
        let falling = panel(false, vec![series("l", &[(0.0, 9.0), (9.0, 0.0)])]);
        assert!(matches!(legend_corner(&rising, (0.0, 9.0)), SeriesLabelPosition::UpperLeft));
        assert!(matches!(legend_corner(&falling, (0.0, 9.0)), SeriesLabelPosition::UpperRight));
    }

    #[test]
    fn text_plots_follow_the_values() {
        assert_eq!(sparkline(&[0.0, 3.5, 7.0, f64::NAN], 10), "▁▅█ ");
        assert_eq!(sparkline(&[1.0; 8], 3), "▁▁▁");
        assert_eq!(sparkline(&[], 5), "");
        assert_eq!(ascii(&[2.0, 1.0], 9, 2), "         2 |*\n         1 | *\n");
        assert_eq!(ascii(&[f64::NAN], 9, 2), "");
    }

    #[test]
    fn axis_numbers_are_short() {
        let shown: Vec<String> = [0.0, 2.5, 1e-5, 2e7, 300.0, -0.25].iter().map(|&value| number(value)).collect();
        assert_eq!(shown, ["0", "2.5", "1.0e-5", "2.0e7", "300", "-0.25"]);
    }
}
