//! From what was counted to how a server would scale: a model, no measurement.
//!
//! A CPU's instructions take a fixed number of cycles each, and so does each line that it
//! has to wait for; the busiest CPU is what limits the server. What is not counted (misses
//! that one CPU alone has, memory and interconnect that are full, NICs) is not in it.

/// How long things take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Model {
    /// Cycles an instruction, when no line has to move.
    pub cpi: f64,
    /// Cycles until a line is here that another CPU had.
    pub latency: f64,
}

/// What one CPU did for all requests.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Work {
    /// Instructions.
    pub insns: f64,
    /// Lines that it had to wait for.
    pub transfers: f64,
}

impl Default for Model {
    fn default() -> Self {
        Self {
            cpi: 1.0,
            latency: 100.0,
        }
    }
}

impl Model {
    /// The span of latencies that is shown beside the default: from a line of the same
    /// die to one of another socket.
    pub const LATENCIES: [f64; 2] = [50.0, 200.0];

    /// The same with another latency.
    pub fn with_latency(latency: f64) -> Self {
        Self {
            latency,
            ..Self::default()
        }
    }

    /// Cycles of one CPU.
    fn cycles(self, work: Work) -> f64 {
        work.insns * self.cpi + work.transfers * self.latency
    }

    /// Cycles a request of the CPU that is busy longest: how often it can be done is limited
    /// by that. None without requests.
    pub fn busiest(self, cpus: &[Work], requests: u64) -> Option<f64> {
        let most = cpus
            .iter()
            .map(|&work| self.cycles(work))
            .fold(0.0, f64::max);
        (requests > 0 && most > 0.0).then(|| most / requests as f64)
    }

    /// The same if all CPUs were equally busy.
    pub fn spread_evenly(self, cpus: &[Work], requests: u64) -> Option<f64> {
        let all: f64 = cpus.iter().map(|&work| self.cycles(work)).sum();
        (requests > 0 && all > 0.0).then(|| all / cpus.len() as f64 / requests as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORK: Work = Work {
        insns: 1000.0,
        transfers: 10.0,
    };

    #[test]
    fn the_busiest_cpu_limits() {
        let idle = Work {
            insns: 10.0,
            transfers: 0.0,
        };
        let model = Model::default();
        assert_eq!(model.busiest(&[WORK, idle], 10), Some(200.0));
        assert_eq!(model.spread_evenly(&[WORK, idle], 10), Some(100.5));
        // Twice as many CPUs and requests: half of it.
        assert_eq!(model.busiest(&[WORK, WORK], 20), Some(100.0));
        assert_eq!(model.busiest(&[WORK], 0), None);
        assert_eq!(model.busiest(&[], 1), None);
    }

    #[test]
    fn who_waits_for_lines_may_be_the_busiest() {
        let waits = Work {
            insns: 900.0,
            transfers: 20.0,
        };
        let busiest = |latency| Model::with_latency(latency).busiest(&[WORK, waits], 1);
        assert_eq!(busiest(0.0), Some(1000.0));
        assert_eq!(busiest(200.0), Some(4900.0));
    }
}
