//! The hosts, for people.

use ax_api::host::HostReport;
use ax_api::report::HostPath;
use ax_api::units::Bytes;

fn state(host: &HostReport) -> &'static str {
    match (host.reachable, host.shutting_down, host.maintenance) {
        (false, _, _) => "away",
        (true, true, _) => "shutting down",
        (true, false, true) => "maintenance",
        (true, false, false) => "in service",
    }
}

fn names(names: &[String]) -> String {
    match names.is_empty() {
        true => "-".to_owned(),
        false => names.join(","),
    }
}

/// Both hosts, a line each, and who decides between them.
pub fn table(hosts: &[HostReport], arbiter: &str) -> String {
    let mut rows = vec![["HOST", "STATE", "RUNS", "SHADOWS", "NOTE"].map(str::to_owned)];
    for host in hosts {
        rows.push([
            host.host.clone(),
            state(host).to_owned(),
            names(&host.runs),
            names(&host.shadows),
            host.why.clone(),
        ]);
    }
    let mut widths = [0; 5];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(widths);
        let line: Vec<String> = cells
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text.push_str(line.join("  ").trim_end());
        text.push('\n');
    }
    text.push_str(&format!("arbiter: {arbiter}\n"));
    for host in hosts {
        let lost = host.paths.iter().filter(|path| path.up == Some(false));
        text.extend(lost.map(|path| {
            let (host, at, why) = (&host.host, path.address, &path.why);
            format!("LOST PATH: {host} has no answer at {at}: {why}\n")
        }));
    }
    text
}

fn path(path: &HostPath) -> String {
    let at = path.address;
    match path.up {
        Some(true) => format!("{at}: up"),
        Some(false) => format!("{at}: LOST: {}", path.why),
        None => format!("{at}: not known yet"),
    }
}

/// All about one.
pub fn details(host: &HostReport) -> String {
    let mut lines = vec![
        ("host", host.host.clone()),
        ("state", state(host).to_owned()),
    ];
    if host.reachable {
        let [total, available] = host.memory.map(|bytes| Bytes(bytes >> 20 << 20));
        lines.extend([
            (
                "axd",
                format!("{}, wire version {}", host.version, host.wire),
            ),
            ("memory", format!("{available} of {total} available")),
            ("runs", names(&host.runs)),
            ("shadows", names(&host.shadows)),
        ]);
        lines.extend(host.paths.iter().map(|at| ("path", path(at))));
    } else {
        lines.push(("why", host.why.clone()));
    }
    let line = |(name, value): (&str, String)| format!("{name:10}{value}\n");
    lines.into_iter().map(line).collect()
}
