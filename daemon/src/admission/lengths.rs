//! Counts lines by their length, so that sums over all lines can be calculated without reading each line.

/// At index `k`: the number of lines with more than `k` requests.
#[derive(Debug, Default)]
pub(super) struct Lengths(Vec<usize>);

impl Lengths {
    /// A line of this length becomes longer by one.
    pub(super) fn grow(&mut self, length: usize) {
        if self.0.len() <= length {
            self.0.resize(length + 1, 0);
        }
        self.0[length] += 1;
    }

    /// A line of this length becomes shorter by one. The length is not 0.
    pub(super) fn shrink(&mut self, length: usize) {
        if let Some(longer) = self.0.get_mut(length - 1) {
            *longer -= 1;
        }
        while self.0.last() == Some(&0) {
            self.0.pop();
        }
    }

    /// The length of the longest line.
    pub(super) fn longest(&self) -> usize {
        self.0.len()
    }

    /// The number of requests in all lines, if at most `most` of each line are counted.
    pub(super) fn up_to(&self, most: usize) -> usize {
        self.0.iter().take(most).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_those_of_the_lines() {
        let mut lengths = Lengths::default();
        let mut lines = [0_usize; 7];
        for step in 0..1000_usize {
            let line = step * 31 % lines.len();
            if step % 5 < 3 || lines[line] == 0 {
                lengths.grow(lines[line]);
                lines[line] += 1;
            } else {
                lengths.shrink(lines[line]);
                lines[line] -= 1;
            }
            assert_eq!(lengths.longest(), lines.into_iter().max().unwrap_or(0));
            for most in 0..40 {
                assert_eq!(lengths.up_to(most), lines.iter().map(|length| (*length).min(most)).sum::<usize>());
            }
        }
    }
}
