use proptest::prelude::*;

use super::*;
use crate::WIRE_VERSION;
use crate::{Generation, Incarnation};

fn leaf(function: u32, index: u32, regs: [u32; 4]) -> CpuidLeaf {
    let [eax, ebx, ecx, edx] = regs;
    CpuidLeaf {
        function,
        index,
        eax,
        ebx,
        ecx,
        edx,
    }
}

fn caps() -> HostCaps {
    HostCaps {
        cpuid: vec![
            leaf(0, 0, [0x16, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
            leaf(1, 0, [0x306f2, 0, 0x0298_2203, 0x0783_fbff]),
            leaf(7, 0, [0, 1 << 5 | 1 << 8, 0, 0]),
            leaf(0xd, 0, [7, 832, 832, 0]),
            leaf(0xd, 2, [256, 576, 0, 0]),
            leaf(0x8000_0008, 0, [46, 0, 0, 0]),
        ],
        msrs: vec![0x10, 0x174, 0xc000_0080],
        tsc_khz: 2_400_000,
        kvm_caps: vec![KvmCap {
            name: "KVM_CAP_XSAVE2".into(),
            value: 4096,
        }],
        page_size: 4096,
        xsave_size: 4096,
    }
}

fn hello(host: &str, role: Role) -> Hello {
    Hello::ours(
        host.into(),
        caps(),
        Some(VmHello {
            session: Session {
                pair: PairId([5; 16]),
                generation: Generation(1),
                incarnation: Incarnation(7),
            },
            role,
            machine: Machine {
                memory_bytes: 256 << 20,
                vcpus: 2,
                devices: [3; 32],
            },
        }),
    )
}

fn pair() -> (Hello, Hello) {
    (hello("anna", Role::Primary), hello("bert", Role::Shadow))
}

fn caps_of(hello: &mut Hello) -> &mut HostCaps {
    &mut hello.body.caps
}

/// The reasons, which must be the same whoever asks.
fn refused(a: &Hello, b: &Hello) -> String {
    let mine = negotiate(a, b).unwrap_err().reasons.join("\n");
    assert!(negotiate(b, a).is_err());
    mine
}

#[test]
fn equal_hosts_agree_on_the_newest_version() {
    let (a, b) = pair();
    assert_eq!(negotiate(&a, &b).unwrap().version, WIRE_VERSION);
    assert_eq!(negotiate(&b, &a).unwrap().version, WIRE_VERSION);
}

#[test]
fn neighbouring_versions_meet_at_the_older() {
    let (old, new) = (Versions::new(3, 4).unwrap(), Versions::new(4, 5).unwrap());
    let (mut a, mut b) = pair();
    (a.versions, b.versions) = (old, new);
    assert_eq!(negotiate(&a, &b).unwrap().version.number(), 4);
    assert_eq!(negotiate(&b, &a).unwrap().version.number(), 4);
}

#[test]
fn a_peer_two_versions_away_is_refused_by_name_before_its_body_is_read() {
    let (ours, theirs) = (Versions::new(4, 5).unwrap(), Versions::new(6, 7).unwrap());
    let mut bytes = vec![6, 0, 7, 0];
    bytes.extend_from_slice(b"a body of a format nobody knows yet");
    let error = Hello::parse(&bytes, ours).unwrap_err();
    assert_eq!(
        error,
        HelloError::NoCommonVersion(TooFarApart { theirs, ours })
    );
    let text = error.to_string();
    assert!(text.contains("6 to 7") && text.contains("4 to 5"), "{text}");
}

#[test]
fn a_feature_the_shadow_lacks_is_named() {
    let (a, mut b) = pair();
    caps_of(&mut b).cpuid[2].ebx = 1 << 8;
    let why = refused(&a, &b);
    assert!(why.contains("bert") && why.contains("avx2"), "{why}");
}

#[test]
fn a_feature_the_shadow_has_more_is_no_obstacle() {
    let (a, mut b) = pair();
    caps_of(&mut b).cpuid[2].ebx |= 1 << 16;
    caps_of(&mut b).msrs.push(0x1234);
    caps_of(&mut b).xsave_size = 8192;
    assert!(negotiate(&a, &b).is_ok());
    assert!(negotiate(&b, &a).is_ok());
}

#[test]
fn between_daemons_both_directions_must_work() {
    let (mut a, mut b) = pair();
    (a.body.vm, b.body.vm) = (None, None);
    assert!(negotiate(&a, &b).is_ok());
    caps_of(&mut b).msrs.push(0x1234);
    assert!(refused(&a, &b).contains("0x1234"));
}

#[test]
fn every_difference_is_named_at_once() {
    let (a, mut b) = pair();
    let caps = caps_of(&mut b);
    caps.msrs.pop();
    caps.tsc_khz = 2_401_000;
    caps.kvm_caps.clear();
    caps.page_size = 16384;
    caps.xsave_size = 2048;
    caps.cpuid[4].ebx = 600;
    caps.cpuid[5].eax = 39;
    caps.cpuid[0].ebx = 0;
    let vm = b.body.vm.as_mut().unwrap();
    vm.machine = Machine {
        memory_bytes: 1,
        vcpus: 1,
        devices: [4; 32],
    };
    vm.role = Role::Primary;
    vm.session.pair = PairId([6; 16]);
    let why = refused(&a, &b);
    for expected in [
        "vendor",
        "MSR 0xc0000080",
        "TSC rate",
        "KVM_CAP_XSAVE2",
        "page size",
        "XSAVE area",
        "XSAVE component 2",
        "46 bits",
        "guest memory",
        "vCPUs",
        "device configuration",
        "both sides say they are the primary",
        "pair:",
    ] {
        assert!(why.contains(expected), "{expected:?} is missing in:\n{why}");
    }
}

#[test]
fn tsc_rates_within_250_ppm_are_equal_enough() {
    let (a, mut b) = pair();
    caps_of(&mut b).tsc_khz = 2_400_600;
    assert!(negotiate(&a, &b).is_ok());
    caps_of(&mut b).tsc_khz = 2_400_601;
    assert!(refused(&a, &b).contains("TSC rate"));
}

#[test]
fn hellos_read_back() {
    let (a, _) = pair();
    assert_eq!(
        Hello::parse(&a.encode().unwrap(), Versions::ours()).unwrap(),
        a
    );
}

#[test]
fn a_hello_with_a_hostile_name_is_refused() {
    for name in [String::new(), "a\nb".into(), "x".repeat(64)] {
        let (mut a, _) = pair();
        a.body.host = name;
        let bytes = a.encode().unwrap();
        assert_eq!(
            Hello::parse(&bytes, Versions::ours()),
            Err(HelloError::Field("host name"))
        );
    }
}

#[test]
fn a_hello_too_large_is_an_error_at_the_sender() {
    let (mut a, _) = pair();
    caps_of(&mut a).msrs = vec![u32::MAX; 100_000];
    assert!(matches!(a.encode(), Err(HelloError::TooLarge(_))));
}

#[test]
fn verdicts_read_back_bounded() {
    let reasons: Vec<String> = (0..500).map(|i| format!("reason {i}\x1b[0m")).collect();
    let bytes = Verdict::Refused(reasons).encode().unwrap();
    let Verdict::Refused(read) = Verdict::parse(&bytes).unwrap() else {
        panic!("agreed");
    };
    assert_eq!(read.len(), MAX_REASONS + 1);
    assert!(read.iter().all(|r| !r.chars().any(char::is_control)));
    assert_eq!(read.last().unwrap(), "and 436 more");
}

proptest! {
    #[test]
    fn hostile_bytes_never_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let mut versioned = vec![1, 0, 1, 0];
        versioned.extend_from_slice(&bytes);
        let _ = Hello::parse(&bytes, Versions::ours());
        let _ = Hello::parse(&versioned, Versions::ours());
        let _ = Verdict::parse(&bytes);
    }

    /// A length prefix that promises more than there is must not make the reader allocate it.
    #[test]
    fn a_damaged_hello_is_an_error_or_another_hello(at in 4usize..100, value in any::<u8>()) {
        let (a, b) = pair();
        let mut bytes = a.encode().unwrap();
        let at = at.min(bytes.len() - 1);
        bytes[at] = value;
        if let Ok(read) = Hello::parse(&bytes, Versions::ours()) {
            let _ = negotiate(&read, &b);
        }
    }

    #[test]
    fn both_sides_come_to_the_same_answer(
        msr in any::<u32>(), khz in 2_390_000u32..2_410_000, ebx in any::<u32>(), shadow in any::<bool>(),
    ) {
        let (mut a, mut b) = pair();
        let caps = caps_of(if shadow { &mut b } else { &mut a });
        caps.msrs.push(msr);
        caps.tsc_khz = khz;
        caps.cpuid[2].ebx = ebx;
        prop_assert_eq!(negotiate(&a, &b).is_ok(), negotiate(&b, &a).is_ok());
    }
}
