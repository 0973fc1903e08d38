//! What `axvm top` shows: a pure function of what axd has said.

use ax_api::host::{State, VmReport};
use ax_api::process::{PathState, Role};
use ax_api::trace::StatsReport;
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Paragraph};

use crate::stats::value;

/// Bytes of a page.
const PAGE: u64 = 4096;

/// The parts of a pause with their colours.
const PARTS: [(&str, &str, Color); 6] = [
    ("park", "park_ns", Color::Blue),
    ("save", "save_ns", Color::Green),
    ("harvest", "harvest_ns", Color::Yellow),
    ("copy", "copy_ns", Color::Magenta),
    ("close", "close_ns", Color::Cyan),
    ("resume", "resume_ns", Color::Red),
];

/// The other times and sizes.
const ROWS: [(&str, &str); 8] = [
    ("pause", "pause_ns"),
    ("pages an epoch", "pages"),
    ("bytes an epoch", "shipped_bytes"),
    ("ship", "ship_ns"),
    ("ack", "ack_ns"),
    ("release", "release_ns"),
    ("held output", "held_ns"),
    ("epoch length", "length_ns"),
];

/// What is known of a VM and its epochs.
pub struct View {
    name: String,
    vm: VmReport,
    /// Why the VM's report is not of now.
    stale: Option<String>,
    /// The newest figures, or why there are none.
    now: Result<StatsReport, String>,
    /// What was counted between the last two figures, and in how many seconds.
    span: Option<(StatsReport, f64)>,
}

/// Bytes a second, or in all.
fn amount(bytes: f64) -> String {
    match bytes {
        b if b >= 1e9 => format!("{:.1} GB", b / 1e9),
        b if b >= 1e6 => format!("{:.1} MB", b / 1e6),
        b if b >= 1e3 => format!("{:.1} kB", b / 1e3),
        b => format!("{b:.0} B"),
    }
}

impl View {
    /// A VM without figures yet.
    pub fn new(name: &str, vm: VmReport) -> View {
        View {
            name: name.to_owned(),
            vm,
            stale: None,
            now: Err("no figures yet".into()),
            span: None,
        }
    }

    /// How the VM is now.
    pub fn is(&mut self, vm: VmReport) {
        (self.vm, self.stale) = (vm, None);
    }

    /// How it is was not to be learned.
    pub fn is_not_told(&mut self, why: String) {
        self.stale = Some(why);
    }

    /// The next figures, or why there are none.
    pub fn heard(&mut self, stats: Result<StatsReport, String>) {
        self.span = match (&stats, &self.now) {
            (Ok(now), Ok(before)) => now.since(before).map(|more| {
                let ns = now.now_ns.saturating_sub(before.now_ns).max(1);
                (more, ns as f64 / 1e9)
            }),
            _ => None,
        };
        self.now = stats;
    }

    fn state(&self) -> Line<'_> {
        let vm = &self.vm;
        let colour = match vm.state {
            State::Protected => Color::Green,
            State::Starting | State::Syncing | State::FailingOver | State::Paused => Color::Yellow,
            _ => Color::Red,
        };
        let host = |host: &Option<String>| host.clone().unwrap_or_else(|| "-".to_owned());
        let mut line = vec![
            Span::styled(vm.state.to_string(), Style::new().fg(colour).bold()),
            Span::raw(format!(
                "   mode {}   runs on {}   shadow on {}",
                vm.vm.mode,
                host(&vm.primary),
                host(&vm.shadow)
            )),
        ];
        if let Some(why) = &self.stale {
            line.push(Span::styled(
                format!("   {why}"),
                Style::new().fg(Color::Red),
            ));
        } else if !vm.note.is_empty() {
            line.push(Span::raw(format!("   {}", vm.note)));
        }
        Line::from(line)
    }

    fn epochs(more: &StatsReport, seconds: f64) -> Line<'_> {
        let rate = |n: u64| format!("{:.0}/s", n as f64 / seconds);
        let mut reasons: Vec<_> = more.reasons.iter().filter(|(_, n)| **n > 0).collect();
        reasons.sort_by_key(|(reason, n)| (std::cmp::Reverse(**n), **reason));
        let reasons = reasons
            .iter()
            .map(|(reason, n)| format!("   {reason} {}", rate(**n)));
        let failed = more.counts.get("failed_captures").copied().unwrap_or(0);
        let mut line = vec![
            Span::raw("epochs ").bold(),
            Span::raw(rate(more.epochs())).bold(),
            Span::raw(reasons.collect::<String>()),
        ];
        if failed > 0 {
            let text = format!("   {failed} captures FAILED");
            line.push(Span::styled(text, Style::new().fg(Color::Red)));
        }
        Line::from(line)
    }

    /// The parts of the median pause, each as wide as it is long.
    fn bar(more: &StatsReport, width: u16) -> [Line<'_>; 2] {
        let medians =
            PARTS.map(|(label, name, colour)| (label, more.histogram(name).per_mille(500), colour));
        let total: u64 = medians.iter().map(|(_, ns, _)| ns).sum();
        let (mut bar, mut legend) = (Vec::new(), vec![Span::raw("us: ")]);
        let (mut sum, mut drawn) = (0, 0);
        for (label, ns, colour) in medians {
            sum += ns;
            // Of the whole so far, so that what is rounded does not add up.
            let until = (sum * u64::from(width)).checked_div(total).unwrap_or(0);
            let cells = until.saturating_sub(drawn) as usize;
            drawn = until;
            bar.push(Span::styled("█".repeat(cells), Style::new().fg(colour)));
            legend.push(Span::styled("■", Style::new().fg(colour)));
            legend.push(Span::raw(format!("{label} {:.0}  ", ns as f64 / 1e3)));
        }
        [Line::from(bar), Line::from(legend)]
    }

    fn table(more: &StatsReport) -> Vec<Line<'_>> {
        let head = format!("{:<16}{:>12}{:>12}{:>12}", "", "p50", "p99", "max");
        let mut lines = vec![Line::from(head).dim()];
        for (label, name) in ROWS {
            let of = more.histogram(name);
            let at = |of_1000| match of.count() {
                0 => "-".to_owned(),
                _ => value(name, of.per_mille(of_1000)),
            };
            let (p50, p99, max) = (at(500), at(990), at(1000));
            lines.push(Line::from(format!(
                "{label:<16}{p50:>12}{p99:>12}{max:>12}"
            )));
        }
        lines
    }

    fn rates(&self, more: &StatsReport, seconds: f64) -> Vec<Line<'_>> {
        let paused = more.histogram("pause_ns").total() as f64 / 1e7 / seconds;
        let pages = more.histogram("pages").total();
        let bytes = more.counts.get("shipped_bytes").copied().unwrap_or(0);
        let rate = |bytes: u64| amount(bytes as f64 / seconds);
        let dirty = rate(pages * PAGE);
        let link = rate(bytes);
        let held = match &self.now {
            Ok(now) if now.oldest_held_ns > 0 => value("held_ns", now.oldest_held_ns),
            _ => "none".to_owned(),
        };
        let mut lines = vec![
            Line::from(format!(
                "paused {paused:.1} % of the time   dirtied {dirty}/s   link {link}/s"
            )),
            Line::from(format!("oldest output held: {held}")),
        ];
        let primary = self.vm.processes.iter().filter_map(|p| p.status.as_ref());
        let primary = primary.filter(|status| status.role == Role::Primary);
        for path in primary.flat_map(|status| &status.paths) {
            let colour = match path.state {
                PathState::Up => Color::Reset,
                PathState::New | PathState::Lost => Color::Red,
            };
            lines.push(Line::styled(
                format!("path {path}"),
                Style::new().fg(colour),
            ));
        }
        lines
    }

    /// Draws it.
    pub fn draw(&self, frame: &mut Frame<'_>) {
        let title = format!(" axvm top: {} ", self.name);
        let keys = " q leaves ";
        let block = Block::bordered()
            .title(title)
            .title_bottom(Line::from(keys).right_aligned());
        let area = block.inner(frame.area());
        frame.render_widget(block, frame.area());
        let mut lines = vec![self.state(), Line::default()];
        match (&self.now, &self.span) {
            (Err(why), _) => lines.push(Line::from(why.as_str())),
            (Ok(_), None) => lines.push(Line::from("figures come in a second")),
            (Ok(_), Some((more, seconds))) => {
                lines.push(View::epochs(more, *seconds));
                lines.push(Line::default());
                let [bar, legend] = View::bar(more, area.width.min(72));
                lines.extend([bar, legend, Line::default()]);
                lines.extend(View::table(more));
                lines.push(Line::default());
                lines.extend(self.rates(more, *seconds));
            }
        }
        let [body] = Layout::vertical([Constraint::Min(0)]).areas::<1>(area);
        let body = Rect {
            x: body.x.saturating_add(1).min(body.right()),
            width: body.width.saturating_sub(2),
            ..body
        };
        frame.render_widget(Paragraph::new(lines), body);
    }
}

#[cfg(test)]
mod tests {
    use ax_api::vm::{Boot, DirtySource, Mode, Vm};
    use ax_wire::PairId;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;
    use crate::stats::tests::report;

    fn vm() -> VmReport {
        let vm = Vm {
            name: "web".into(),
            pair: PairId([7; 16]),
            mode: Mode::Ft,
            memory: 256 << 20,
            cpus: 1,
            boot: Boot::Probe {
                cmdline: String::new(),
            },
            disks: vec![],
            nics: vec![],
            autostart: false,
            dirty: DirtySource::Auto,
            verify_every: None,
            preferred: None,
        };
        VmReport {
            vm,
            state: State::Protected,
            healthy: true,
            note: String::new(),
            primary: Some("alpha".into()),
            shadow: Some("beta".into()),
            processes: vec![],
            arbiter: String::new(),
        }
    }

    fn shown(view: &View, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| view.draw(frame)).unwrap();
        let buffer = terminal.backend().buffer();
        let row = |y| (0..width).map(move |x| buffer[(x, y)].symbol()).collect();
        (0..height).map(row).collect()
    }

    /// Half a second in which 500 epochs were captured.
    fn busy() -> View {
        let mut view = View::new("web", vm());
        view.heard(Ok(report(1000, 1_000_000_000)));
        view.heard(Ok(report(1500, 1_500_000_000)));
        view
    }

    #[test]
    fn a_second_of_a_busy_vm_is_shown_whole_on_a_small_terminal() {
        let lines = shown(&busy(), 80, 24);
        let screen = lines.join("\n");
        for expected in [
            "axvm top: web",
            "protected   mode ft   runs on alpha   shadow on beta",
            "epochs 1000/s   output 1000/s",
            "us: ■park 40  ■save 40  ■harvest 40  ■copy 40  ■close 40  ■resume 40",
            "pause               150.0 us    150.0 us    450.0 us",
            "pages an epoch            90          90         270",
            "held output          40.0 us",
            "link 400.0 MB/s",
            "oldest output held: 420.0 us",
            "q leaves",
        ] {
            assert!(screen.contains(expected), "{expected:?} in\n{screen}");
        }
        // Six parts of the same length share the bar.
        let bar = lines.iter().find(|line| line.contains('█')).unwrap();
        assert_eq!(bar.chars().filter(|c| *c == '█').count(), 72, "{bar}");
    }

    #[test]
    fn the_parts_of_a_pause_are_as_wide_as_they_are_long() {
        let mut now = report(1500, 2);
        let copy = now.histograms.get_mut("copy_ns").unwrap();
        (copy.max, copy.buckets) = (200_000, vec![(200_000, 1500)]);
        let [bar, _] = View::bar(&now, 40);
        let width = |colour| {
            let of = bar.spans.iter().filter(|s| s.style.fg == Some(colour));
            of.map(|s| s.content.chars().count()).sum::<usize>()
        };
        assert_eq!(
            (width(Color::Magenta), width(Color::Blue), bar.width()),
            (20, 4, 40)
        );
    }

    #[test]
    fn without_figures_it_says_why() {
        let mut view = busy();
        view.heard(Err("web has no epochs now".into()));
        let mut degraded = vm();
        (degraded.state, degraded.shadow) = (State::Degraded, None);
        degraded.note = "runs without a shadow".into();
        view.is(degraded);
        let screen = shown(&view, 100, 12).join("\n");
        assert!(
            screen.contains("degraded   mode ft   runs on alpha   shadow on -   runs without"),
            "{screen}"
        );
        assert!(screen.contains("web has no epochs now"), "{screen}");
        view.is_not_told("axd does not answer".into());
        assert!(
            shown(&view, 100, 12)
                .join("\n")
                .contains("axd does not answer")
        );
        // Another engine: no figures of a second yet.
        let mut next = report(3, 9);
        next.of.engine_ns += 1;
        view.heard(Ok(report(2000, 2_000_000_000)));
        view.heard(Ok(next));
        assert!(
            shown(&view, 80, 12)
                .join("\n")
                .contains("figures come in a second")
        );
    }

    #[test]
    fn no_terminal_is_too_small() {
        for (width, height) in [(1, 1), (3, 2), (10, 3), (200, 60)] {
            shown(&busy(), width, height);
        }
    }
}
