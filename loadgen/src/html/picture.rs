//! Draws pictures: a frame with scales, and its content.

use super::page::escape;
use crate::units;

pub(super) const WIDTH: f64 = 960.0;
pub(super) const HEIGHT: f64 = 260.0;
/// Space for the labels: left, right, top, bottom.
pub(super) const MARGIN: (f64, f64, f64, f64) = (64.0, 84.0, 14.0, 40.0);

/// A picture with its scales.
pub(super) struct Frame {
    pub(super) x: (f64, f64),
    pub(super) y: (f64, f64),
    log: bool,
    pub(super) svg: String,
}

impl Frame {
    pub(super) fn new(x: (f64, f64), y: (f64, f64), log: bool) -> Self {
        Self { x, y, log, svg: String::new() }
    }

    pub(super) fn at_x(&self, x: f64) -> f64 {
        let (left, right, ..) = MARGIN;
        left + (x - self.x.0) / (self.x.1 - self.x.0) * (WIDTH - left - right)
    }

    pub(super) fn at_y(&self, y: f64) -> f64 {
        let (.., top, bottom) = MARGIN;
        let scale = |y: f64| if self.log { y.max(self.y.0).ln() } else { y };
        let part = (scale(y) - scale(self.y.0)) / (scale(self.y.1) - scale(self.y.0));
        HEIGHT - bottom - part * (HEIGHT - top - bottom)
    }

    pub(super) fn horizontal(&mut self, y: f64, label: &str) {
        let (at, left, right) = (self.at_y(y), MARGIN.0, WIDTH - MARGIN.1);
        self.svg.push_str(&format!(
            "<line class=\"grid\" x1=\"{left}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
            left - 8.0,
            at + 4.0
        ));
    }

    pub(super) fn vertical(&mut self, x: f64, label: &str) {
        let (at, bottom) = (self.at_x(x), HEIGHT - MARGIN.3);
        self.svg.push_str(&format!(
            "<line class=\"axis\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{bottom}\" y2=\"{:.1}\"/>\
             <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>",
            bottom + 5.0,
            bottom + 20.0
        ));
    }

    /// Draws an objective as a horizontal line.
    pub(super) fn objective(&mut self, y: f64, name: &str) {
        let (at, left, right) = (self.at_y(y), MARGIN.0, WIDTH - MARGIN.1);
        self.svg.push_str(&format!(
            "<line class=\"objective\" x1=\"{left}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
             <text class=\"objective-name\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            left + 6.0,
            at - 5.0,
            escape(name)
        ));
    }

    /// Marks a position on the horizontal scale. `row` separates overlapping names.
    pub(super) fn mark(&mut self, x: f64, name: &str, class: &str, row: u8) {
        let (at, top, bottom) = (self.at_x(x), MARGIN.2, HEIGHT - MARGIN.3);
        let y = top + 10.0 + 15.0 * f64::from(row);
        // The text goes to the side with enough space.
        let (x, anchor) = if at > WIDTH * 0.6 { (at - 5.0, "end") } else { (at + 5.0, "start") };
        self.svg.push_str(&format!(
            "<line class=\"{class}\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{top}\" y2=\"{bottom}\"/>\
             <text class=\"{class}-name name\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>",
            escape(name)
        ));
    }

    pub(super) fn dot(&mut self, x: f64, y: f64, colour: &str, hint: &str) {
        let (x, y) = (self.at_x(x), self.at_y(y));
        self.svg.push_str(&format!(
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.5\" style=\"fill:var({colour})\"><title>{}</title></circle>",
            escape(hint)
        ));
    }

    /// Draws a small mark at a point.
    pub(super) fn point(&mut self, x: f64, y: f64, colour: &str, hint: &str) {
        let (x, y) = (self.at_x(x), self.at_y(y));
        self.svg.push_str(&format!(
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.5\" style=\"fill:var({colour})\"><title>{}</title></circle>",
            escape(hint)
        ));
    }

    /// Draws a line, with gaps where there is no value.
    pub(super) fn line(&mut self, points: &[Option<(f64, f64)>], style: &str) {
        let mut path = String::new();
        let mut pen_up = true;
        for point in points {
            match point {
                Some((x, y)) => {
                    let command = if pen_up { 'M' } else { 'L' };
                    path.push_str(&format!("{command}{:.1} {:.1}", self.at_x(*x), self.at_y(*y)));
                    pen_up = false;
                }
                None => pen_up = true,
            }
        }
        self.svg.push_str(&format!("<path d=\"{path}\" fill=\"none\" stroke-width=\"2\" stroke-linejoin=\"round\" stroke-linecap=\"round\" {style}/>"));
    }

    pub(super) fn finish(mut self, x_label: &str, description: &str) -> String {
        let (bottom, left, right) = (HEIGHT - MARGIN.3, MARGIN.0, WIDTH - MARGIN.1);
        self.svg.push_str(&format!(
            "<line class=\"axis\" x1=\"{left}\" x2=\"{right}\" y1=\"{bottom}\" y2=\"{bottom}\"/>\
             <text x=\"{right}\" y=\"{:.1}\" text-anchor=\"end\">{x_label}</text>",
            HEIGHT - 4.0
        ));
        format!(
            "<div class=\"picture\"><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{description}\">{}</svg></div>",
            self.svg
        )
    }

    /// Writes names at the right end of lines, and moves them apart if they would overlap.
    pub(super) fn names(&mut self, names: &[(&str, f64, &str)]) {
        // If two values are equal, the line that was drawn last is on top.
        let mut at: Vec<(f64, &str, &str)> =
            names.iter().rev().map(|(name, y, colour)| (self.at_y(*y), *name, *colour)).collect();
        at.sort_by(|a, b| a.0.total_cmp(&b.0));
        for index in 1..at.len() {
            at[index].0 = at[index].0.max(at[index - 1].0 + 14.0);
        }
        let lowest = HEIGHT - MARGIN.3;
        let over = at.last().map_or(0.0, |last| (last.0 - lowest).max(0.0));
        for (y, name, colour) in at {
            let (x, y) = (WIDTH - MARGIN.1 + 8.0, y - over + 4.0);
            self.svg.push_str(&format!(
                "<text class=\"name\" x=\"{x:.1}\" y=\"{y:.1}\" style=\"fill:var({colour})\">{name}</text>"
            ));
        }
    }
}

/// A round number that is at least `most` ÷ 4, as the step of a scale.
pub(super) fn step(most: f64) -> f64 {
    let raw = (most / 4.0).max(1e-9);
    let power = 10_f64.powf(raw.log10().floor());
    let factor = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().find(|factor| factor * power >= raw * 0.999);
    factor.unwrap_or(10.0) * power
}

pub(super) fn seconds_axis(frame: &mut Frame, seconds: usize) {
    let step = step(seconds as f64 * 0.4).max(1.0).round();
    let mut at = 0.0;
    while at <= seconds as f64 {
        frame.vertical(at, &format!("{at:.0}"));
        at += step;
    }
}

pub(super) fn count_axis(frame: &mut Frame, most: f64) {
    let step = step(most).max(1.0);
    let mut at = 0.0;
    while at <= most {
        frame.horizontal(at, &units::count(at));
        at += step;
    }
}

/// The powers of ten below `least` and above `most`.
pub(super) fn decades(least: f64, most: f64) -> (f64, f64) {
    let low = 10_f64.powf(least.max(1e-6).log10().floor());
    let high = 10_f64.powf((most.max(1e-6) * 1.0001).log10().ceil());
    (low, if high > low { high } else { low * 10.0 })
}

pub(super) fn time_axis(frame: &mut Frame) {
    let mut at = frame.y.0;
    let label = |time: f64| match time {
        t if t >= 0.9995 => format!("{t:.0} s"),
        t if t >= 0.000_999 => format!("{:.0} ms", t * 1e3),
        t => format!("{:.0} µs", t * 1e6),
    };
    while at <= frame.y.1 * 1.001 {
        frame.horizontal(at, &label(at));
        at *= 10.0;
    }
}

/// Labels the horizontal scale with quantiles. Each step leaves out ten times fewer releases.
pub(super) fn quantile_axis(frame: &mut Frame) {
    for (at, label) in (0_u8..).zip(["0 %", "90 %", "99 %", "99.9 %", "99.99 %", "99.999 %"]) {
        if f64::from(at) <= frame.x.1 {
            frame.vertical(f64::from(at), label);
        }
    }
}

/// Labels the horizontal scale with numbers.
pub(super) fn count_axis_x(frame: &mut Frame) {
    let (left, right) = frame.x;
    let step = step(right - left).max(1.0);
    let mut at = (left / step).ceil() * step;
    while at <= right {
        frame.vertical(at, &units::count(at));
        at += step;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_right() {
        assert_eq!((step(100.0), step(430.0), step(1.0)), (25.0, 200.0, 0.25));
        let (low, high) = decades(0.002, 0.03);
        assert!((low - 0.001).abs() < 1e-9 && (high - 0.1).abs() < 1e-9);
    }
}
