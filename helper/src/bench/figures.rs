//! Figures as SVG.

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use std::fmt::Display;

/// Lines over numbers of CPUs.
pub struct Lines<'a> {
    /// Above it.
    pub title: &'a str,
    /// Along the horizontal axis.
    pub x: &'a str,
    /// Along the vertical axis.
    pub y: &'a str,
    /// Each with its points: CPUs, value, lowest, highest.
    pub series: Vec<(String, Vec<[f64; 4]>)>,
}

/// Groups of bars.
pub struct Bars<'a> {
    /// Above it.
    pub title: &'a str,
    /// Along the vertical axis.
    pub y: &'a str,
    /// What the bars of a group are.
    pub series: Vec<String>,
    /// Each with a bar of each series: value, lowest, highest; none is a gap.
    pub groups: Vec<(String, Vec<Option<[f64; 3]>>)>,
}

const SIZE: (u32, u32) = (960, 540);

/// Told apart by those who see no red and green, too (Okabe and Ito's), then repeated darker.
const COLOURS: [RGBColor; 12] = [
    RGBColor(0, 0, 0),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 158, 115),
    RGBColor(204, 180, 20),
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(204, 121, 167),
    RGBColor(120, 120, 120),
    RGBColor(140, 90, 0),
    RGBColor(20, 90, 60),
    RGBColor(120, 50, 100),
];

fn colour(series: usize) -> RGBColor {
    COLOURS[series % COLOURS.len()]
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// What is drawn, on white.
fn svg(draw: impl FnOnce(&Area<'_>) -> Result<()>) -> Result<String> {
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
    area.fill(&WHITE).map_err(failed)?;
    draw(&area)?;
    area.present().map_err(failed)?;
    drop(area);
    Ok(svg)
}

/// A chart to be, with so much room on its right and below.
fn frame<'a, 'b>(
    area: &'a Area<'b>,
    title: &str,
    right: u32,
    below: u32,
) -> ChartBuilder<'a, 'b, SVGBackend<'b>> {
    let mut chart = ChartBuilder::on(area);
    chart
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .margin_right(right)
        .x_label_area_size(below)
        .y_label_area_size(64);
    chart
}

/// plotters' errors borrow from what was drawn on.
fn failed(error: impl Display) -> anyhow::Error {
    anyhow!("a figure cannot be drawn: {error}")
}

impl Lines<'_> {
    /// The SVG. CPUs double from tick to tick.
    pub fn svg(&self) -> Result<String> {
        svg(|area| self.draw(area))
    }

    fn draw(&self, area: &Area<'_>) -> Result<()> {
        let points = || self.series.iter().flat_map(|(_, points)| points);
        let top = points().map(|point| point[3]).fold(1.0, f64::max) * 1.05;
        let last = points().map(|point| point[0]).fold(1.0, f64::max).log2();
        let mut chart = frame(area, self.title, 30, 44)
            .build_cartesian_2d(-0.1..last + 0.1, 0.0..top)
            .map_err(failed)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_labels(last as usize + 2)
            .x_label_formatter(&|x| {
                if (x - x.round()).abs() < 0.01 {
                    format!("{}", 2f64.powf(x.round()))
                } else {
                    String::new()
                }
            })
            .x_desc(self.x)
            .y_desc(self.y)
            .label_style(("sans-serif", 14))
            .draw()
            .map_err(failed)?;
        for (number, (name, points)) in self.series.iter().enumerate() {
            let colour = colour(number);
            let at = |point: &[f64; 4], y: usize| (point[0].log2(), point[y]);
            chart
                .draw_series(LineSeries::new(
                    points.iter().map(|point| at(point, 1)),
                    colour.stroke_width(2),
                ))
                .map_err(failed)?
                .label(name)
                .legend(move |(x, y)| {
                    Rectangle::new([(x, y - 4), (x + 16, y + 4)], colour.filled())
                });
            chart
                .draw_series(
                    points
                        .iter()
                        .map(|point| Circle::new(at(point, 1), 4, colour.filled())),
                )
                .map_err(failed)?;
            // From the lowest to the highest.
            chart
                .draw_series(
                    points
                        .iter()
                        .map(|point| PathElement::new([at(point, 2), at(point, 3)], colour)),
                )
                .map_err(failed)?;
        }
        legend(&mut chart)
    }
}

impl Bars<'_> {
    /// The SVG.
    pub fn svg(&self) -> Result<String> {
        svg(|area| self.draw(area))
    }

    fn draw(&self, area: &Area<'_>) -> Result<()> {
        let bars = || {
            self.groups
                .iter()
                .flat_map(|(_, bars)| bars.iter().flatten())
        };
        let top = bars().map(|bar| bar[2].max(bar[0])).fold(1.0, f64::max) * 1.1;
        let mut chart = frame(area, self.title, 44, 96)
            .build_cartesian_2d(-0.5..self.groups.len() as f64 - 0.5, 0.0..top)
            .map_err(failed)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_labels(0)
            .y_desc(self.y)
            .label_style(("sans-serif", 14))
            .draw()
            .map_err(failed)?;
        let width = 0.8 / self.series.len().max(1) as f64;
        for number in 0..self.series.len() {
            let colour = colour(if self.series.len() == 1 { 5 } else { number });
            let bars: Vec<(f64, [f64; 3])> = self
                .groups
                .iter()
                .enumerate()
                .filter_map(|(group, (_, bars))| {
                    let left = group as f64 - 0.4 + width * number as f64;
                    Some((left, (*bars.get(number)?)?))
                })
                .collect();
            chart
                .draw_series(bars.iter().map(|&(left, bar)| {
                    Rectangle::new([(left, 0.0), (left + width * 0.9, bar[0])], colour.filled())
                }))
                .map_err(failed)?;
            chart
                .draw_series(
                    bars.iter()
                        .filter(|(_, bar)| bar[2] > bar[1])
                        .map(|&(left, bar)| {
                            let middle = left + width * 0.45;
                            PathElement::new([(middle, bar[1]), (middle, bar[2])], BLACK)
                        }),
                )
                .map_err(failed)?;
        }
        // The names of the groups, aslant, so that they have room.
        let (left, right) = (76.0, f64::from(SIZE.0) - 44.0);
        let step = (right - left) / self.groups.len().max(1) as f64;
        let base = SIZE.1 as i32 - 96;
        for (group, (name, _)) in self.groups.iter().enumerate() {
            let x = left + step * (group as f64 + 0.5);
            let row = base
                + 8
                + if group % 2 == 1 && self.groups.len() > 7 {
                    20
                } else {
                    0
                };
            let style = TextStyle::from(("sans-serif", 13).into_font()).pos(
                plotters::style::text_anchor::Pos::new(
                    plotters::style::text_anchor::HPos::Center,
                    plotters::style::text_anchor::VPos::Top,
                ),
            );
            area.draw(&Text::new(name.as_str(), (x as i32, row), style))
                .map_err(failed)?;
        }
        // A row below: there are bars everywhere above.
        let row = SIZE.1 as i32 - 26;
        let mut x = 70;
        for (number, name) in self.series.iter().enumerate() {
            if self.series.len() == 1 {
                break;
            }
            let colour = colour(number).filled();
            area.draw(&Rectangle::new([(x, row + 2), (x + 10, row + 12)], colour))
                .map_err(failed)?;
            let style = ("sans-serif", 12).into_font();
            area.draw(&Text::new(name.as_str(), (x + 14, row), style))
                .map_err(failed)?;
            // As wide as a letter is on average.
            x += 26 + name.len() as i32 * 6;
        }
        Ok(())
    }
}

fn legend<'a, X, Y>(chart: &mut ChartContext<'a, SVGBackend<'a>, Cartesian2d<X, Y>>) -> Result<()>
where
    X: Ranged<ValueType = f64>,
    Y: Ranged<ValueType = f64>,
{
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .label_font(("sans-serif", 14))
        .draw()
        .map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_was_measured_is_drawn() {
        let svg = Lines {
            title: "Title",
            x: "CPUs that send",
            y: "transfers a packet",
            series: vec![
                (
                    "one".to_owned(),
                    vec![[1.0, 0.0, 0.0, 0.0], [8.0, 9.0, 8.0, 10.0]],
                ),
                ("two".to_owned(), vec![[32.0, 3.0, 1.0, 4.0]]),
            ],
        }
        .svg()
        .expect("drawn");
        for text in ["Title", "transfers a packet", ">\none", ">\ntwo", "CPUs"] {
            assert!(svg.contains(text), "{text} in {svg}");
        }
        assert_eq!(svg.matches("<circle").count(), 3);
    }

    #[test]
    fn nothing_is_drawn_for_what_is_missing() {
        let bars = |second| Bars {
            title: "Title",
            y: "y",
            series: vec!["a".to_owned(), "b".to_owned()],
            groups: vec![("group".to_owned(), vec![Some([1.0; 3]), second])],
        };
        let count = |bars: &Bars<'_>| bars.svg().expect("drawn").matches("<rect").count();
        assert_eq!(count(&bars(Some([1.0; 3]))), count(&bars(None)) + 1);
        let empty = Bars {
            groups: Vec::new(),
            ..bars(None)
        };
        assert!(empty.svg().expect("drawn").contains("Title"));
    }
}
