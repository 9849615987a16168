//! Choice of the instruction set at run time.

use std::fmt;

/// An instruction set for which the kernels are written.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Level {
    /// What every CPU of the architecture has. On x86-64 products and sums are rounded separately.
    Portable,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
}

impl Level {
    /// All levels, slowest first.
    pub const ALL: [Self; 3] = [Self::Portable, Self::Avx2, Self::Avx512];

    /// The levels that this CPU has, slowest first.
    #[must_use]
    pub fn available() -> Vec<Self> {
        Self::ALL
            .into_iter()
            .filter(|level| level.is_available())
            .collect()
    }

    /// The fastest level that this CPU has.
    #[must_use]
    pub fn best() -> Self {
        Self::ALL
            .into_iter()
            .rfind(|level| level.is_available())
            .unwrap_or(Self::Portable)
    }

    /// Whether this CPU (and operating system) has the level.
    #[must_use]
    pub fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 => false,
        }
    }

    /// The name used in settings and reports: `portable`, `avx2` or `avx512`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// The level of that [`Level::name`], whether or not this CPU has it.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|level| level.name() == name)
    }

    /// Whether a multiply-add is rounded once (a fused instruction) at this level.
    #[must_use]
    pub fn is_fused(self) -> bool {
        match self {
            Self::Portable => cfg!(any(target_arch = "aarch64", target_feature = "fma")),
            Self::Avx2 | Self::Avx512 => true,
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Proof that the CPU has a level; every kernel is a method of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Kernels {
    level: Level,
}

impl Kernels {
    /// The kernels of a level, or nothing where the CPU lacks it.
    #[must_use]
    pub fn new(level: Level) -> Option<Self> {
        level.is_available().then_some(Self { level })
    }

    /// The kernels of the fastest level that the CPU has.
    #[must_use]
    pub fn best() -> Self {
        Self {
            level: Level::best(),
        }
    }

    /// The level of these kernels.
    #[must_use]
    pub fn level(&self) -> Level {
        self.level
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for level in Level::ALL {
            assert_eq!(Level::parse(level.name()), Some(level));
        }
        assert_eq!(Level::parse("avx1024"), None);
    }

    #[test]
    fn kernels_exist_for_available_levels_only() {
        for level in Level::ALL {
            assert_eq!(
                Kernels::new(level).is_some(),
                level.is_available(),
                "{level}"
            );
        }
        assert_eq!(Level::available().first(), Some(&Level::Portable));
        assert_eq!(Level::available().last(), Some(&Level::best()));
        assert_eq!(Kernels::best().level(), Level::best());
    }
}
