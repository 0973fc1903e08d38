//! `cargo xtask bench-compare`: two commits, one machine, the same bench in turn, and the ratios of what
//! it says. Figures drift from machine to machine and from hour to hour; ratios of runs side by side do
//! so less.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use crate::Error;

#[derive(Debug, Args)]
pub struct Options {
    /// The commit that is compared with.
    before: String,
    /// The commit that is compared.
    after: String,
    /// Which bench, as `cargo bench --bench` takes it.
    #[arg(long)]
    bench: String,
    /// Runs of each commit, in turn: A B, B A, A B …
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Print one line of JSON at the end; everything else goes to standard error.
    #[arg(long)]
    json: bool,
}

/// One figure of both commits: medians of the rounds.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Compared {
    figure: String,
    before: f64,
    after: f64,
    /// `after` over `before`; none where that says nothing.
    ratio: Option<f64>,
}

/// The line `--json` ends with.
#[derive(Debug, Serialize)]
struct Report<'a> {
    bench: &'a str,
    before: &'a str,
    after: &'a str,
    rounds: u32,
    figures: &'a [Compared],
}

/// Runs the comparison.
pub fn run(options: &Options) -> Result<ExitCode, Error> {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .ok_or_else(|| Error::Failed("no workspace".into()))?;
    let dir = tempfile::tempdir()
        .map_err(|e| Error::Failed(format!("cannot make a temporary folder: {e}")))?;
    let trees = [("before", &options.before), ("after", &options.after)]
        .map(|(name, commit)| Tree::check_out(repository, dir.path(), name, commit));
    let [before, after] = trees;
    let trees = [before?, after?];
    for tree in &trees {
        eprintln!("building {} (the first time this takes minutes)", tree.sha);
        tree.build(&options.bench)?;
    }
    let mut seen: [Vec<Figures>; 2] = Default::default();
    for round in 0..options.rounds {
        let order = if round.is_multiple_of(2) {
            [0, 1]
        } else {
            [1, 0]
        };
        for n in order {
            eprintln!("round {}: {}", round + 1, trees[n].sha);
            seen[n].push(figures(&trees[n].measure(&options.bench)?));
        }
    }
    let compared = compare(&seen[0], &seen[1]);
    let report = Report {
        bench: &options.bench,
        before: &trees[0].sha,
        after: &trees[1].sha,
        rounds: options.rounds,
        figures: &compared,
    };
    tell(&report, options.json)?;
    Ok(ExitCode::SUCCESS)
}

fn tell(report: &Report<'_>, json: bool) -> Result<(), Error> {
    let width = report.figures.iter().map(|f| f.figure.len()).max();
    let width = width.unwrap_or(0);
    let mut table = format!(
        "{:width$} {:>12} {:>12}  after / before\n",
        "", "before", "after"
    );
    for f in report.figures {
        let ratio = f.ratio.map_or("-".into(), |r| format!("{r:.3}"));
        table += &format!(
            "{:width$} {:12.3} {:12.3}  {ratio}\n",
            f.figure, f.before, f.after
        );
    }
    if !json {
        print!("{table}");
        return Ok(());
    }
    eprint!("{table}");
    let line = serde_json::to_string(report).map_err(|e| Error::Failed(e.to_string()))?;
    println!("{line}");
    Ok(())
}

/// A commit checked out. Dropping it takes the worktree away; what was built stays in the workspace's
/// target folder, for the next comparison.
struct Tree<'a> {
    repository: &'a Path,
    dir: PathBuf,
    target: PathBuf,
    sha: String,
}

impl<'a> Tree<'a> {
    fn check_out(
        repository: &'a Path,
        dir: &Path,
        name: &str,
        commit: &str,
    ) -> Result<Self, Error> {
        let wanted = format!("{commit}^{{commit}}");
        let sha = git(repository, &["rev-parse", "--short", "--verify", &wanted])?;
        let tree = Tree {
            repository,
            dir: dir.join(name),
            target: repository.join("target/bench-compare").join(name),
            sha,
        };
        let at = tree.dir.to_string_lossy();
        git(
            repository,
            &["worktree", "add", "--quiet", "--detach", &at, &wanted],
        )?;
        Ok(tree)
    }

    fn cargo_bench(&self, bench: &str) -> Command {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo
            .current_dir(&self.dir)
            .args(["bench", "--package", "ax", "--bench", bench]);
        cargo.arg("--target-dir").arg(&self.target);
        // Each is to measure its own product.
        cargo.env_remove("AX_PRODUCT_DIR").stdin(Stdio::null());
        cargo
    }

    fn build(&self, bench: &str) -> Result<(), Error> {
        let status = self.cargo_bench(bench).arg("--no-run").status();
        let status = status.map_err(|e| Error::Failed(format!("cannot run cargo: {e}")))?;
        match status.success() {
            true => Ok(()),
            false => Err(Error::Failed(format!(
                "the bench {bench} of {} cannot be built, see above; has that commit such a bench?",
                self.sha
            ))),
        }
    }

    /// What one run says.
    fn measure(&self, bench: &str) -> Result<Value, Error> {
        let output = self.cargo_bench(bench).stderr(Stdio::inherit()).output();
        let output = output.map_err(|e| Error::Failed(format!("cannot run cargo: {e}")))?;
        let said = String::from_utf8_lossy(&output.stdout);
        let failed = |why: &str| Error::Failed(format!("bench {bench} of {}: {why}", self.sha));
        if !output.status.success() {
            return Err(failed(&format!("{}\n{said}", output.status)));
        }
        last_json(&said).ok_or_else(|| failed("it printed no line of JSON"))
    }
}

impl Drop for Tree<'_> {
    fn drop(&mut self) {
        let at = self.dir.to_string_lossy();
        if let Err(e) = git(self.repository, &["worktree", "remove", "--force", &at]) {
            eprintln!("{e}");
        }
    }
}

fn git(repository: &Path, args: &[&str]) -> Result<String, Error> {
    let output = Command::new("git")
        .arg("-C")
        .arg(repository)
        .args(args)
        .output();
    let output = output.map_err(|e| Error::Failed(format!("cannot run git: {e}")))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim().to_string());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::Failed(format!(
        "git {}: {}",
        args.join(" "),
        said.trim()
    )))
}

/// The last line of a program's output that is a JSON object.
fn last_json(said: &str) -> Option<Value> {
    let mut lines = said.lines().rev();
    lines.find_map(|line| serde_json::from_str(line).ok().filter(Value::is_object))
}

/// Figures of one run by name.
type Figures = BTreeMap<String, f64>;

/// Every number in a bench's result, named by where it is. An element of a list is named by the texts in
/// it (its case, its link), and by its place where several have the same.
fn figures(result: &Value) -> Figures {
    let mut all = Figures::new();
    collect(result, "", &mut all);
    all
}

fn collect(value: &Value, name: &str, all: &mut Figures) {
    let within = |key: &str| match name {
        "" => key.to_string(),
        name => format!("{name} {key}"),
    };
    match value {
        Value::Number(n) => {
            all.extend(n.as_f64().map(|n| (name.to_string(), n)));
        }
        Value::Object(fields) => {
            // What should be reached is no figure.
            let figures = fields.iter().filter(|(key, _)| !key.starts_with("target"));
            figures.for_each(|(key, value)| collect(value, &within(key), all));
        }
        Value::Array(elements) => {
            let mut seen: BTreeMap<String, u32> = BTreeMap::new();
            for element in elements {
                let label = label(element);
                let n = seen.entry(label.clone()).or_default();
                *n += 1;
                let label = match (label.as_str(), *n) {
                    ("", n) => format!("#{n}"),
                    (_, 1) => label,
                    (_, n) => format!("{label} #{n}"),
                };
                // "results" says nothing that the label does not.
                let name = if name == "results" {
                    label
                } else {
                    within(&label)
                };
                collect(element, &name, all);
            }
        }
        Value::Null | Value::Bool(_) | Value::String(_) => {}
    }
}

fn label(element: &Value) -> String {
    let fields = element.as_object().into_iter().flatten();
    let texts: Vec<&str> = fields.filter_map(|(_, value)| value.as_str()).collect();
    texts.join(" ")
}

/// The figures that every run has.
fn compare(before: &[Figures], after: &[Figures]) -> Vec<Compared> {
    let of = |runs: &[Figures], figure: &str| -> Option<f64> {
        let all: Option<Vec<f64>> = runs.iter().map(|run| run.get(figure).copied()).collect();
        median(all?)
    };
    let names = before.iter().flat_map(Figures::keys);
    let names: std::collections::BTreeSet<&String> = names.collect();
    let compared = names.into_iter().filter_map(|figure| {
        let (before, after) = (of(before, figure)?, of(after, figure)?);
        let ratio = (before != 0.0).then(|| after / before);
        Some(Compared {
            figure: figure.clone(),
            before,
            after,
            ratio,
        })
    });
    compared.collect()
}

/// The median; of an even number of figures the mean of the middle two.
fn median(mut figures: Vec<f64>) -> Option<f64> {
    figures.sort_by(f64::total_cmp);
    let n = figures.len();
    let (low, high) = (figures.get(n.checked_sub(1)? / 2)?, figures.get(n / 2)?);
    Some((low + high) / 2.0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn run(p50: f64, kept: f64) -> Figures {
        figures(&json!({"bench": "x", "results": [
            {"case": "get", "link": "mtls", "us": {"p50": p50}, "target_kept": 0.6},
            {"case": "set", "kept": kept},
        ]}))
    }

    #[test]
    fn figures_are_named_by_the_texts_beside_them() {
        let expected = [("get mtls us p50", 7.0), ("set kept", 0.5)];
        let expected = expected.map(|(name, figure)| (name.to_string(), figure));
        assert_eq!(run(7.0, 0.5), Figures::from(expected));
        let alike =
            json!({"results": [{"ram": "4G", "n": 1}, {"ram": "4G", "n": 2}], "us": [3, 4]});
        let names: Vec<String> = figures(&alike).into_keys().collect();
        assert_eq!(names, ["4G #2 n", "4G n", "us #1", "us #2"]);
    }

    #[test]
    fn ratios_are_of_medians_and_of_what_every_run_has() {
        let mut short = run(30.0, 0.4);
        short.remove("set kept");
        let before = [run(10.0, 0.5), run(1000.0, 0.5), run(20.0, 0.0)];
        let after = [run(10.0, 0.5), short];
        assert_eq!(
            compare(&before, &after),
            [Compared {
                figure: "get mtls us p50".into(),
                before: 20.0,
                after: 20.0,
                ratio: Some(1.0),
            }]
        );
        let zero = compare(&[run(0.0, 0.5)], &[run(5.0, 1.0)]);
        let ratios: Vec<Option<f64>> = zero.iter().map(|c| c.ratio).collect();
        assert_eq!(ratios, [None, Some(2.0)]);
        assert!(compare(&[], &[run(1.0, 1.0)]).is_empty());
    }

    #[test]
    fn the_last_object_of_an_output_is_its_result() {
        let said = "a table\n{\"n\": 1}\n{\"n\": 2}\n3\nthe end\n";
        assert_eq!(last_json(said), Some(json!({"n": 2})));
        assert_eq!(last_json("a table\n7\n"), None);
    }
}
