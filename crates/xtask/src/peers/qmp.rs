//! QEMU's machine protocol over a Unix socket: one JSON object a line
//! (<https://www.qemu.org/docs/master/interop/qmp-spec.html>).

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Error;

/// What QEMU says in one line.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// Its first words.
    Greeting,
    /// Something happened, at a time of the machine's real-time clock.
    Event { name: String, at: Duration },
    /// A command's result.
    Return(Value),
    /// A command's failure.
    Refused(String),
}

/// Reads a line.
pub fn parse(line: &str) -> Result<Message, String> {
    let said: Value = serde_json::from_str(line).map_err(|e| format!("{e}: {line}"))?;
    if said.get("QMP").is_some() {
        return Ok(Message::Greeting);
    }
    if let Some(name) = said["event"].as_str() {
        let part = |name: &str| said["timestamp"][name].as_u64().unwrap_or(0);
        let at = Duration::from_secs(part("seconds")) + Duration::from_micros(part("microseconds"));
        return Ok(Message::Event {
            name: name.into(),
            at,
        });
    }
    if let Some(error) = said.get("error") {
        let why = error["desc"].as_str().map_or(error.to_string(), Into::into);
        return Ok(Message::Refused(why));
    }
    match said.get("return") {
        Some(result) => Ok(Message::Return(result.clone())),
        None => Err(format!("neither event nor answer: {line}")),
    }
}

/// A command's line. Without arguments there must be no word of them.
pub fn line(command: &str, arguments: &Value) -> String {
    let said = match arguments {
        Value::Null => json!({"execute": command}),
        arguments => json!({"execute": command, "arguments": arguments}),
    };
    format!("{said}\n")
}

/// A connection to one QEMU.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    name: String,
}

impl Qmp {
    /// Connects as soon as QEMU listens; each later answer may take as long, too.
    pub fn connect(path: &Path, patience: Duration) -> Result<Qmp, Error> {
        let name = path.display().to_string();
        let failed = |e: std::io::Error| Error::Failed(format!("QEMU at {name}: {e}"));
        let deadline = Instant::now() + patience;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(e) if Instant::now() > deadline => return Err(failed(e)),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        stream.set_read_timeout(Some(patience)).map_err(failed)?;
        let stream = BufReader::new(stream);
        let mut qmp = Qmp { stream, name };
        qmp.run("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    /// For someone who listens only: the next message may take for ever.
    pub fn listen(path: &Path, patience: Duration) -> Result<Qmp, Error> {
        let qmp = Qmp::connect(path, patience)?;
        let endless = qmp.stream.get_ref().set_read_timeout(None);
        endless.map_err(|e| qmp.failed(e))?;
        Ok(qmp)
    }

    /// Does something and gives its result. Events before it are passed over.
    pub fn run(&mut self, command: &str, arguments: Value) -> Result<Value, Error> {
        self.send(command, &arguments)?;
        loop {
            match self.next()? {
                Some(Message::Return(result)) => return Ok(result),
                Some(Message::Refused(why)) => {
                    return Err(self.failed(format!("{command}: {why}")));
                }
                Some(Message::Greeting | Message::Event { .. }) => {}
                None => return Err(self.failed(format!("it ended at {command}"))),
            }
        }
    }

    /// Sends a command whose answer somebody will read by [`Qmp::next`].
    pub fn send(&mut self, command: &str, arguments: &Value) -> Result<(), Error> {
        let text = line(command, arguments);
        let sent = self.stream.get_mut().write_all(text.as_bytes());
        sent.map_err(|e| self.failed(format!("{command}: {e}")))
    }

    /// What it says next; nothing once it has ended.
    pub fn next(&mut self) -> Result<Option<Message>, Error> {
        let mut text = String::new();
        match self.stream.read_line(&mut text) {
            Ok(0) => Ok(None),
            Ok(_) => parse(&text).map(Some).map_err(|e| self.failed(e)),
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => Ok(None),
            Err(e) => Err(self.failed(e)),
        }
    }

    fn failed(&self, why: impl std::fmt::Display) -> Error {
        Error::Failed(format!("QEMU at {}: {why}", self.name))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn lines_are_told_apart() {
        let greeting = r#"{"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": ["oob"]}}"#;
        assert_eq!(parse(greeting), Ok(Message::Greeting));
        let event = r#"{"timestamp": {"seconds": 17, "microseconds": 978580}, "event": "STOP"}"#;
        let at = Duration::from_micros(17_978_580);
        let name = "STOP".to_string();
        assert_eq!(parse(event), Ok(Message::Event { name, at }));
        let refusal = r#"{"error": {"class": "GenericError", "desc": "no such node"}}"#;
        let refused = Message::Refused("no such node".into());
        assert_eq!(parse(refusal), Ok(refused));
        let answer = parse(r#"{"return": {"status": "colo"}}"#);
        assert_eq!(answer, Ok(Message::Return(json!({"status": "colo"}))));
        assert!(parse("{}").is_err() && parse("QEMU 7.2").is_err());
    }

    #[test]
    fn a_command_is_one_line() {
        assert_eq!(line("cont", &Value::Null), "{\"execute\":\"cont\"}\n");
        let with = line("migrate", &json!({"uri": "tcp:a\nb"}));
        assert_eq!(with.matches('\n').count(), 1);
        assert!(with.contains("\"arguments\""), "{with}");
    }

    #[test]
    fn events_do_not_answer_a_command() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let qemu = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream);
            let mut heard = Vec::new();
            let event = "{\"timestamp\":{\"seconds\":1,\"microseconds\":0},\"event\":\"RESUME\"}\n";
            reader.get_mut().write_all(b"{\"QMP\":{}}\n").unwrap();
            for answer in [
                "{\"return\":{}}",
                "{\"return\":7}",
                "{\"error\":{\"desc\":\"no\"}}",
            ] {
                let mut text = String::new();
                reader.read_line(&mut text).unwrap();
                heard.push(text);
                reader.get_mut().write_all(event.as_bytes()).unwrap();
                let answer = format!("{answer}\n");
                reader.get_mut().write_all(answer.as_bytes()).unwrap();
            }
            heard
        });
        let mut qmp = Qmp::connect(&path, Duration::from_secs(20)).unwrap();
        assert_eq!(qmp.run("query-it", Value::Null).unwrap(), json!(7));
        let refused = qmp.run("do-it", json!({"a": 1})).unwrap_err().to_string();
        assert!(refused.contains("do-it: no"), "{refused}");
        let heard = qemu.join().unwrap();
        assert!(heard[0].contains("qmp_capabilities") && heard[2].contains("do-it"));
        assert_eq!(qmp.next().unwrap(), None);
    }
}
