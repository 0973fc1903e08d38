use super::*;

const GOOD: &str = r#"name = "alpha"
data_dir = "/var/lib/axd"
listen = "0.0.0.0:7430"
peer = { name = "beta", addresses = ["10.0.0.2:7430"] }
link = { addresses = ["10.99.0.1"] }
witness = { name = "w", addresses = ["10.0.0.3:7431"] }
"#;

fn read(text: &str) -> Result<Config, String> {
    parse(text, Path::new("axd.toml"), 7430).map_err(|e| e.to_string())
}

#[test]
fn the_shipped_example_is_good() {
    let text = include_str!("../dist/axd.toml");
    let config = read(text).unwrap();
    assert!(config.mtls && config.peer.is_some());
}

#[test]
fn defaults_are_the_documented_ones() {
    let config = read(GOOD).unwrap();
    assert_eq!(config.timing, Timing::default());
    assert_eq!(config.socket, PathBuf::from("/run/axd/axd.sock"));
    assert!(config.mtls);
    assert_eq!(config.side(), Side::A);
    assert_eq!(
        config.security(),
        Security::Mtls {
            dir: "/var/lib/axd".into()
        }
    );
    let alone = read("name = \"alpha\"\ndata_dir = \"/d\"\nsecurity = \"plain\"").unwrap();
    assert_eq!(alone.arbiter, Arbiter::Manual);
    assert_eq!(alone.security(), Security::Plain);
    assert!(alone.peer.is_none() && alone.link.is_empty());
}

#[test]
fn a_standby_is_a_further_machine_and_stands_by_for_somebody() {
    let standby = |name: &str| {
        read(&format!(
            "{GOOD}standby = {{ name = \"{name}\", addresses = [\"10.0.0.4:7431\"] }}\n"
        ))
    };
    let good = standby("v").unwrap().standby.unwrap();
    assert_eq!(good.to_string(), "witness v");
    for taken in ["alpha", "beta", "w"] {
        assert!(standby(taken).unwrap_err().contains("name"), "{taken}");
    }
    let for_nobody = GOOD.replace("witness =", "standby =");
    assert!(read(&for_nobody).unwrap_err().contains("stands by for"));
}

#[test]
fn an_etcd_takes_the_witnesss_place_by_addresses_alone_and_not_beside_one() {
    let without = GOOD.replace("witness = {", "# witness = {");
    let with = |etcd: &str| read(&format!("{without}etcd = {etcd}\n"));
    let good = with(r#"["http://10.0.0.5:2379", "http://[2001:db8::5]:2379/"]"#).unwrap();
    let members = ["10.0.0.5:2379", "[2001:db8::5]:2379"].map(|a| a.parse().unwrap());
    let members = members.to_vec();
    assert_eq!(good.arbiter, Arbiter::Etcd { members });
    for bad in [
        r#"["https://10.0.0.5:2379"]"#,
        r#"["http://etcd.example:2379"]"#,
        r#"["http://10.0.0.5:0"]"#,
        "[]",
    ] {
        let why = with(bad).unwrap_err();
        assert!(why.contains(":7:") && why.contains("etcd"), "{why}");
    }
    let both = read(&format!("{GOOD}etcd = [\"http://10.0.0.5:2379\"]\n")).unwrap_err();
    assert!(both.contains("not both"), "{both}");
}

/// Every bad configuration is refused with the place and the thing named.
#[test]
fn bad_configurations_name_place_and_cure() {
    let cases: &[(&str, &[&str])] = &[
        ("", &["name"]),
        ("name = \"alpha\"", &["data_dir"]),
        ("name = \"alpha\"\ndata_dir = \"d\"", &[":2:", "absolute"]),
        ("name = \"Al pha\"\ndata_dir = \"/d\"", &[":1:", "a-z"]),
        (
            "name = \"alpha\"\ndata_dir = \"/d\"\ncolour = 1",
            &["line 3", "colour"],
        ),
        ("name = alpha", &["line 1"]),
        (
            "name = \"alpha\"\ndata_dir = \"/d\"\nlisten = \"nowhere\"",
            &["line 3", "address"],
        ),
        (
            "name = \"alpha\"\ndata_dir = \"/d\"\nlisten = []",
            &["listen"],
        ),
        (
            "name = \"alpha\"\ndata_dir = \"/d\"\nsecurity = \"none\"",
            &["line 3", "mtls", "plain"],
        ),
        (
            "name = \"alpha\"\ndata_dir = \"/d\"\npeer = { name = \"beta\", addresses = [\"1.1.1.1:1\"] }",
            &["link"],
        ),
        (
            "name = \"alpha\"\ndata_dir = \"/d\"\nlink = { addresses = [\"10.0.0.1\"] }\npeer = { name = \"alpha\", addresses = [\"1.1.1.1:1\"] }",
            &[":4:", "differ"],
        ),
        (
            "name = \"alpha\"\ndata_dir = \"/d\"\nlink = { addresses = [\"10.0.0.1\"] }\npeer = { name = \"beta\", addresses = [] }",
            &[":4:", "peer.addresses"],
        ),
        (
            "name = \"alpha\"\ndata_dir = \"/d\"\nlink = { addresses = [\"0.0.0.0\"] }",
            &[":3:", "link.addresses"],
        ),
        (
            "name = \"alpha\"\ndata_dir = \"/d\"\n\nheartbeat_ms = 0",
            &[":4:", "heartbeat_ms"],
        ),
        (
            "name = \"alpha\"\ndata_dir = \"/d\"\nheartbeat_ms = 50\ndetect_ms = 100",
            &[":4:", "detect_ms = 150"],
        ),
        (
            "name = \"alpha\"\ndata_dir = \"/d\"\ndetect_ms = -1",
            &["line 3"],
        ),
        (
            "name = \"alpha\"\ndata_dir = \"/d\"\nsocket = \"x\"",
            &[":3:", "socket"],
        ),
    ];
    for (text, wanted) in cases {
        let error = read(text).unwrap_err();
        for word in *wanted {
            assert!(error.contains(word), "{text:?} gave {error:?}, no {word:?}");
        }
    }
    let long = format!("name = \"alpha\"\ndata_dir = \"/{}\"", "d".repeat(60));
    assert!(read(&long).unwrap_err().contains("too long"));
    let twins = GOOD.replace("name = \"w\"", "name = \"beta\"");
    assert!(read(&twins).unwrap_err().contains("third"));
}
