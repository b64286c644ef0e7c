//! The Universal Scalability Law (Gunther): throughput as a function of concurrency, `X(N) = λN ÷ (1 + σ(N−1) +
//! κN(N−1))`.
//!
//! λ is the throughput of one caller. σ is the share of the work that is serial (it limits the throughput to λ÷σ). κ is
//! the cost that callers cause each other (beyond the peak the throughput falls).

use serde::{Deserialize, Serialize};

/// A fitted law.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Usl {
    /// λ: the throughput of one caller.
    pub lambda: f64,
    /// σ: contention.
    pub sigma: f64,
    /// κ: coherency.
    pub kappa: f64,
    /// The share of the throughput's variation that the law explains, from 0 to 1.
    pub r_squared: f64,
}

impl Usl {
    /// Fits the law to points (concurrency, throughput). Minimises the squares of the relative deviations of `N÷X`, in
    /// which the law is linear. Negative σ or κ are impossible and are set to zero.
    ///
    /// `None` for fewer than three points, or if λ is not positive.
    #[must_use]
    pub fn fit(points: &[(f64, f64)]) -> Option<Self> {
        if points.len() < 3 || points.iter().any(|(n, x)| *n < 1.0 || *x <= 0.0) {
            return None;
        }
        // Fits with σ, κ or both set to zero; the best possible fit wins.
        let fits =
            [[true, true], [true, false], [false, true], [false, false]].map(|free| Self::fit_with(points, free));
        let mut fits: Vec<_> = fits.into_iter().flatten().collect();
        fits.sort_by(|a, b| a.1.total_cmp(&b.1));
        fits.first().map(|(law, _)| *law)
    }

    fn fit_with(points: &[(f64, f64)], free: [bool; 2]) -> Option<(Self, f64)> {
        let basis = |n: f64| [1.0, if free[0] { n - 1.0 } else { 0.0 }, if free[1] { n * (n - 1.0) } else { 0.0 }];
        let mut matrix = [[0.0; 4]; 3];
        for (n, x) in points {
            let (row, y) = (basis(*n), n / x);
            for (i, line) in matrix.iter_mut().enumerate() {
                for (j, cell) in line.iter_mut().enumerate() {
                    *cell += row[i] * row.get(j).copied().unwrap_or(y) / (y * y);
                }
            }
        }
        for (at, is_free) in [(1, free[0]), (2, free[1])] {
            if !is_free {
                matrix[at][at] = 1.0;
            }
        }
        let [a, b, c] = solve(matrix)?;
        if a <= 0.0 || b < 0.0 || c < 0.0 {
            return None;
        }
        let mut law = Self { lambda: 1.0 / a, sigma: b / a, kappa: c / a, r_squared: 0.0 };
        let error: f64 = points.iter().map(|(n, x)| (1.0 - x / law.throughput(*n)).powi(2)).sum();
        let mean = points.iter().map(|(_, x)| x).sum::<f64>() / points.len() as f64;
        let all: f64 = points.iter().map(|(_, x)| (x - mean).powi(2)).sum();
        let left: f64 = points.iter().map(|(n, x)| (x - law.throughput(*n)).powi(2)).sum();
        law.r_squared = if all > 0.0 { 1.0 - left / all } else { 1.0 };
        Some((law, error))
    }

    /// Throughput at a concurrency.
    #[must_use]
    pub fn throughput(&self, n: f64) -> f64 {
        self.lambda * n / (1.0 + self.sigma * (n - 1.0) + self.kappa * n * (n - 1.0))
    }

    /// The concurrency with the highest throughput; `None` if the throughput never falls.
    #[must_use]
    pub fn peak(&self) -> Option<f64> {
        (self.kappa > 0.0).then(|| ((1.0 - self.sigma).max(0.0) / self.kappa).sqrt().max(1.0))
    }

    /// The highest throughput, reached or approached; infinite if the law has no bound.
    #[must_use]
    pub fn ceiling(&self) -> f64 {
        match self.peak() {
            Some(peak) => self.throughput(peak),
            None if self.sigma > 0.0 => self.lambda / self.sigma,
            None => f64::INFINITY,
        }
    }
}

/// Solves the equations by Gaussian elimination with pivoting.
fn solve(mut m: [[f64; 4]; 3]) -> Option<[f64; 3]> {
    for at in 0..3 {
        let pivot = (at..3).max_by(|a, b| m[*a][at].abs().total_cmp(&m[*b][at].abs()))?;
        m.swap(at, pivot);
        if m[at][at].abs() < 1e-12 {
            return None;
        }
        for row in 0..3 {
            if row != at {
                let factor = m[row][at] / m[at][at];
                let pivot_row = m[at];
                m[row].iter_mut().zip(pivot_row).for_each(|(cell, pivot)| *cell -= factor * pivot);
            }
        }
    }
    Some([m[0][3] / m[0][0], m[1][3] / m[1][1], m[2][3] / m[2][2]])
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn points(law: &Usl, noise: impl Fn(usize) -> f64) -> Vec<(f64, f64)> {
        let at = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0];
        at.iter().enumerate().map(|(i, n)| (*n, law.throughput(*n) * noise(i))).collect()
    }

    proptest! {
        #[test]
        fn a_law_is_found_again(lambda in 1.0..1e4_f64, sigma in 0.0..0.5_f64, kappa in 0.0..0.01_f64) {
            let law = Usl { lambda, sigma, kappa, r_squared: 1.0 };
            let found = Usl::fit(&points(&law, |_| 1.0)).unwrap();
            prop_assert!((found.lambda / lambda - 1.0).abs() < 1e-3, "{found:?}");
            prop_assert!((found.sigma - sigma).abs() < 1e-3, "{found:?}");
            prop_assert!((found.kappa - kappa).abs() < 1e-4, "{found:?}");
            prop_assert!(found.r_squared > 0.999);
        }
    }

    #[test]
    fn noise_moves_it_little_and_nonsense_is_refused() {
        let law = Usl { lambda: 100.0, sigma: 0.05, kappa: 0.0005, r_squared: 1.0 };
        let found = Usl::fit(&points(&law, |i| if i % 2 == 0 { 1.03 } else { 0.97 })).unwrap();
        assert!((found.ceiling() / law.ceiling() - 1.0).abs() < 0.15, "{found:?}");
        assert!((law.peak().unwrap() - 43.6).abs() < 0.1);
        // The throughput grows faster than linearly. The nearest possible law has no contention.
        let found = Usl::fit(&[(1.0, 10.0), (2.0, 21.0), (4.0, 44.0)]).unwrap();
        assert_eq!((found.sigma, found.kappa, found.peak()), (0.0, 0.0, None));
        assert!(Usl::fit(&[(1.0, 10.0), (2.0, 20.0)]).is_none());
        assert!(Usl::fit(&[(1.0, 10.0), (2.0, 0.0), (4.0, 1.0)]).is_none());
    }
}
