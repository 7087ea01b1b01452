//! Reading a test's KTAP, and holding it to what it promised.

/// What came of one case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// `ok`
    Passed,
    /// `not ok`
    Failed,
    /// `ok … # SKIP`
    Skipped,
}

/// Reads the top level of one test's output, line by line.
#[derive(Debug, Default)]
pub struct Reader {
    plan: Option<usize>,
    skip_all: bool,
    results: Vec<(Outcome, String)>,
}

impl Reader {
    /// Indented lines (a subtest's) and diagnostics count for nothing here.
    pub fn line(&mut self, line: &str) {
        if let Some(plan) = line.strip_prefix("1..") {
            let (number, comment) = plan.split_once('#').unwrap_or((plan, ""));
            if let Ok(number) = number.trim().parse() {
                self.plan = Some(number);
                self.skip_all = number == 0 && comment.trim_start().starts_with("SKIP");
            }
            return;
        }
        let (outcome, rest) = if let Some(rest) = line.strip_prefix("not ok ") {
            (Outcome::Failed, rest)
        } else if let Some(rest) = line.strip_prefix("ok ") {
            (Outcome::Passed, rest)
        } else {
            return;
        };
        let Some((number, rest)) = rest.split_once(' ').or(Some((rest, ""))) else {
            return;
        };
        if number.parse::<usize>().is_err() {
            return;
        }
        let (name, directive) = rest.split_once(" # ").unwrap_or((rest, ""));
        let outcome = match outcome {
            Outcome::Passed if directive.starts_with("SKIP") => Outcome::Skipped,
            other => other,
        };
        let name = name.trim().trim_start_matches("- ").to_owned();
        self.results.push((outcome, name));
    }

    /// The cases, and what is wrong with the test as a whole: no plan, a short
    /// count, an exit code that says otherwise than the lines.
    pub fn finish(self, exit: i32) -> (Vec<(Outcome, String)>, Vec<String>) {
        let mut results = self.results;
        let mut wrong = Vec::new();
        let failed = results
            .iter()
            .any(|(outcome, _)| *outcome == Outcome::Failed);
        match self.plan {
            None => wrong.push("no plan line".to_owned()),
            Some(_) if self.skip_all && results.is_empty() => {
                results.push((Outcome::Skipped, "all".to_owned()));
            }
            Some(0) => wrong.push("planned no case".to_owned()),
            Some(plan) if plan != results.len() => {
                wrong.push(format!("planned {plan} cases, ran {}", results.len()));
            }
            Some(_) => {}
        }
        match exit {
            // 1 with all cases passed: the test noticed something the lines do not say.
            0 | 4 if !failed => {}
            1 if failed => {}
            code => wrong.push(format!("exit code {code} does not fit its cases")),
        }
        (results, wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, exit: i32) -> (Vec<Outcome>, Vec<String>) {
        let mut reader = Reader::default();
        text.lines().for_each(|line| reader.line(line));
        let (results, wrong) = reader.finish(exit);
        (
            results.into_iter().map(|(outcome, _)| outcome).collect(),
            wrong,
        )
    }

    #[test]
    fn a_full_run_is_counted() {
        let text = "KTAP version 1\n1..3\n# note\nok 1 - a\n    ok 1 - nested\nnot ok 2 - b\nok 3 - c # SKIP none\n";
        let (results, wrong) = read(text, 1);
        assert_eq!(
            results,
            [Outcome::Passed, Outcome::Failed, Outcome::Skipped]
        );
        assert!(wrong.is_empty(), "{wrong:?}");
    }

    #[test]
    fn what_is_cut_short_is_wrong() {
        assert_eq!(read("", 0).1, ["no plan line"]);
        assert_eq!(read("1..0\n", 0).1, ["planned no case"]);
        assert_eq!(read("1..2\nok 1 - a\n", 0).1, ["planned 2 cases, ran 1"]);
        assert_eq!(read("1..1\nok 1 - a\nok 2 - b\n", 0).1.len(), 1);
    }

    #[test]
    fn the_exit_code_must_fit() {
        assert_eq!(read("1..1\nok 1 - a\n", 1).1.len(), 1);
        assert_eq!(read("1..1\nnot ok 1 - a\n", 0).1.len(), 1);
        assert_eq!(read("1..1\nok 1 - a\n", 139).1.len(), 1);
        assert!(read("1..1\nok 1 - a # SKIP\n", 4).1.is_empty());
    }

    #[test]
    fn a_test_may_skip_as_a_whole() {
        let (results, wrong) = read("KTAP version 1\n1..0 # SKIP no tap\n", 4);
        assert_eq!(results, [Outcome::Skipped]);
        assert!(wrong.is_empty(), "{wrong:?}");
    }
}
