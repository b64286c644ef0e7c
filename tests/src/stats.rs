//! Statistics for printed reports.

/// Returns the median; 0 for an empty slice.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

/// Returns z of the Mann-Whitney U test: the difference between two samples, in standard deviations of chance. Ties share
/// their ranks; the variance is not corrected for ties.
#[must_use]
pub fn mann_whitney_z(one: &[f64], other: &[f64]) -> f64 {
    let mut all: Vec<(f64, bool)> = one.iter().map(|v| (*v, true)).chain(other.iter().map(|v| (*v, false))).collect();
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut rank_sum = 0.0;
    let mut at = 0;
    while at < all.len() {
        let ties = all[at..].iter().take_while(|(v, _)| v.total_cmp(&all[at].0).is_eq()).count();
        let rank = at as f64 + (ties as f64 + 1.0) / 2.0;
        rank_sum += rank * all[at..at + ties].iter().filter(|(_, first)| *first).count() as f64;
        at += ties;
    }
    let (n, m) = (one.len() as f64, other.len() as f64);
    let u = rank_sum - n * (n + 1.0) / 2.0;
    (u - n * m / 2.0) / (n * m * (n + m + 1.0) / 12.0).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_textbook_is_right() {
        assert_eq!((median(&[]), median(&[3.0, 1.0, 2.0]), median(&[4.0, 1.0])), (0.0, 2.0, 2.5));
        let same: Vec<f64> = (0..50).map(f64::from).collect();
        assert!(mann_whitney_z(&same, &same).abs() < 1e-9);
        let higher: Vec<f64> = same.iter().map(|v| v + 100.0).collect();
        assert!(mann_whitney_z(&higher, &same) > 8.0);
        // U = 2 of 3 × 3: (2 - 4.5) / sqrt(5.25).
        assert!((mann_whitney_z(&[1.0, 2.0, 5.0], &[3.0, 4.0, 6.0]) + 1.0911).abs() < 1e-3);
    }
}
