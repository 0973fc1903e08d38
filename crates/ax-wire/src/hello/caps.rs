//! What a host offers guests, and what a guest of one host would miss on another.
//!
//! CPUID is compared by meaning: feature words bit by bit (the target must have every bit of the
//! source), the vendor and the XSAVE layout for equality, limits by size. Leaves that only
//! describe the host (topology, caches, brand, frequencies) are sent to the guest from the
//! primary's copy and need not agree.

/// One CPUID leaf as KVM offers it to guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub struct CpuidLeaf {
    /// EAX on input.
    pub function: u32,
    /// ECX on input; 0 for leaves without sub-leaves.
    pub index: u32,
    /// EAX on output.
    pub eax: u32,
    /// EBX on output.
    pub ebx: u32,
    /// ECX on output.
    pub ecx: u32,
    /// EDX on output.
    pub edx: u32,
}

/// One KVM capability: what `KVM_CHECK_EXTENSION` answers.
#[derive(Clone, Debug, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub struct KvmCap {
    /// Its name, for messages.
    pub name: String,
    /// The answer.
    pub value: u64,
}

/// What a host's processor and KVM offer guests.
#[derive(Clone, Debug, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub struct HostCaps {
    /// CPUID as offered to guests.
    pub cpuid: Vec<CpuidLeaf>,
    /// MSRs that are saved and restored.
    pub msrs: Vec<u32>,
    /// Guest TSC rate, kHz.
    pub tsc_khz: u32,
    /// KVM capabilities that the saved state depends on.
    pub kvm_caps: Vec<KvmCap>,
    /// Host page size, bytes.
    pub page_size: u32,
    /// Size of a vCPU's XSAVE area, bytes.
    pub xsave_size: u32,
}

/// TSC rates may differ by this much, in parts per million (rule 11).
pub const TSC_PPM: u64 = 250;

#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    fn of(self, leaf: &CpuidLeaf) -> u32 {
        match self {
            Register::Eax => leaf.eax,
            Register::Ebx => leaf.ebx,
            Register::Ecx => leaf.ecx,
            Register::Edx => leaf.edx,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Register::Eax => "EAX",
            Register::Ebx => "EBX",
            Register::Ecx => "ECX",
            Register::Edx => "EDX",
        }
    }
}

/// Registers that are sets of features (Intel SDM vol. 2A "CPUID"; AMD APM vol. 3 appendix E;
/// Linux Documentation/virt/kvm/x86/cpuid.rst), and the bits in them that are not.
const FEATURE_WORDS: &[(u32, u32, Register, u32)] = {
    use Register::*;
    &[
        // OSXSAVE mirrors CR4, set by the guest itself.
        (0x1, 0, Ecx, 1 << 27),
        (0x1, 0, Edx, 0),
        (0x6, 0, Eax, 0),
        (0x7, 0, Ebx, 0),
        // OSPKE mirrors CR4.
        (0x7, 0, Ecx, 1 << 4),
        (0x7, 0, Edx, 0),
        (0x7, 1, Eax, 0),
        (0x7, 1, Edx, 0),
        (0x7, 2, Edx, 0),
        // XCR0 components.
        (0xd, 0, Eax, 0),
        (0xd, 0, Edx, 0),
        (0xd, 1, Eax, 0),
        (0xd, 1, Ecx, 0),
        (0xd, 1, Edx, 0),
        // KVM paravirtual features.
        (0x4000_0001, 0, Eax, 0),
        (0x8000_0001, 0, Ecx, 0),
        (0x8000_0001, 0, Edx, 0),
        (0x8000_0007, 0, Edx, 0),
        (0x8000_0008, 0, Ebx, 0),
        (0x8000_0021, 0, Eax, 0),
    ]
};

/// Names of bits people look for; others are named by number.
const BIT_NAMES: &[(u32, u32, &str, u32, &str)] = &[
    (0x1, 0, "ECX", 0, "sse3"),
    (0x1, 0, "ECX", 1, "pclmulqdq"),
    (0x1, 0, "ECX", 9, "ssse3"),
    (0x1, 0, "ECX", 12, "fma"),
    (0x1, 0, "ECX", 13, "cx16"),
    (0x1, 0, "ECX", 17, "pcid"),
    (0x1, 0, "ECX", 19, "sse4.1"),
    (0x1, 0, "ECX", 20, "sse4.2"),
    (0x1, 0, "ECX", 21, "x2apic"),
    (0x1, 0, "ECX", 22, "movbe"),
    (0x1, 0, "ECX", 23, "popcnt"),
    (0x1, 0, "ECX", 24, "tsc-deadline"),
    (0x1, 0, "ECX", 25, "aes"),
    (0x1, 0, "ECX", 26, "xsave"),
    (0x1, 0, "ECX", 28, "avx"),
    (0x1, 0, "ECX", 29, "f16c"),
    (0x1, 0, "ECX", 30, "rdrand"),
    (0x7, 0, "EBX", 0, "fsgsbase"),
    (0x7, 0, "EBX", 3, "bmi1"),
    (0x7, 0, "EBX", 4, "hle"),
    (0x7, 0, "EBX", 5, "avx2"),
    (0x7, 0, "EBX", 7, "smep"),
    (0x7, 0, "EBX", 8, "bmi2"),
    (0x7, 0, "EBX", 9, "erms"),
    (0x7, 0, "EBX", 10, "invpcid"),
    (0x7, 0, "EBX", 11, "rtm"),
    (0x7, 0, "EBX", 16, "avx512f"),
    (0x7, 0, "EBX", 17, "avx512dq"),
    (0x7, 0, "EBX", 18, "rdseed"),
    (0x7, 0, "EBX", 19, "adx"),
    (0x7, 0, "EBX", 20, "smap"),
    (0x7, 0, "EBX", 28, "avx512cd"),
    (0x7, 0, "EBX", 29, "sha"),
    (0x7, 0, "EBX", 30, "avx512bw"),
    (0x7, 0, "EBX", 31, "avx512vl"),
    (0x7, 0, "ECX", 2, "umip"),
    (0x7, 0, "ECX", 3, "pku"),
    (0x7, 0, "ECX", 9, "vaes"),
    (0x7, 0, "ECX", 16, "la57"),
    (0x7, 0, "EDX", 22, "amx-bf16"),
    (0x7, 0, "EDX", 24, "amx-tile"),
    (0x7, 0, "EDX", 26, "spec-ctrl"),
    (0x8000_0001, 0, "EDX", 20, "nx"),
    (0x8000_0001, 0, "EDX", 26, "1GiB pages"),
    (0x8000_0001, 0, "EDX", 27, "rdtscp"),
    (0x8000_0001, 0, "ECX", 6, "sse4a"),
    (0x8000_0007, 0, "EDX", 8, "invariant TSC"),
];

impl HostCaps {
    fn leaf(&self, function: u32, index: u32) -> Option<&CpuidLeaf> {
        self.cpuid
            .iter()
            .find(|l| l.function == function && l.index == index)
    }

    fn vendor(&self) -> String {
        let Some(leaf) = self.leaf(0, 0) else {
            return "unknown".into();
        };
        [leaf.ebx, leaf.edx, leaf.ecx]
            .iter()
            .flat_map(|r| r.to_le_bytes())
            .filter(u8::is_ascii_graphic)
            .map(char::from)
            .collect()
    }
}

/// Everything a guest started on `from` would miss on `to`: one line each, naming the host.
pub fn lacking(from: (&str, &HostCaps), to: (&str, &HostCaps)) -> Vec<String> {
    let ((from_name, source), (to_name, target)) = (from, to);
    let mut out = Vec::new();
    let (a, b) = (source.vendor(), target.vendor());
    if a != b {
        out.push(format!(
            "processor vendor: {from_name} has {a}, {to_name} has {b}"
        ));
    }
    cpuid_features(source, to_name, target, &mut out);
    cpuid_layout(from, to, &mut out);
    for msr in &source.msrs {
        if !target.msrs.contains(msr) {
            out.push(format!(
                "{to_name} cannot restore MSR {msr:#x}, which {from_name} saves"
            ));
        }
    }
    let (a, b) = (u64::from(source.tsc_khz), u64::from(target.tsc_khz));
    // Relative to the smaller, so that both sides come to the same answer.
    if a.abs_diff(b) * 1_000_000 > TSC_PPM * a.min(b) {
        out.push(format!(
            "TSC rate: {from_name} has {a} kHz, {to_name} has {b} kHz; they may differ by {TSC_PPM} ppm"
        ));
    }
    for cap in &source.kvm_caps {
        let has = target
            .kvm_caps
            .iter()
            .find(|c| c.name == cap.name)
            .map_or(0, |c| c.value);
        if has < cap.value {
            out.push(format!(
                "KVM capability {}: {from_name} has {}, {to_name} has {has}; use the same kernel on both",
                crate::channel::printable(cap.name.as_bytes()),
                cap.value
            ));
        }
    }
    if source.xsave_size > target.xsave_size {
        out.push(format!(
            "XSAVE area: {from_name} needs {} bytes, {to_name} has {}",
            source.xsave_size, target.xsave_size
        ));
    }
    out
}

fn cpuid_features(source: &HostCaps, to_name: &str, target: &HostCaps, out: &mut Vec<String>) {
    for (function, index, register, ignored) in FEATURE_WORDS {
        let Some(has) = source.leaf(*function, *index).map(|l| register.of(l)) else {
            continue;
        };
        let offered = target.leaf(*function, *index).map_or(0, |l| register.of(l));
        let missing = has & !offered & !ignored;
        for bit in (0..32).filter(|b| missing & (1 << b) != 0) {
            let name = BIT_NAMES
                .iter()
                .find(|(f, i, r, b, _)| {
                    f == function && i == index && *r == register.name() && *b == bit
                })
                .map_or(String::new(), |(.., name)| format!(" ({name})"));
            out.push(format!(
                "{to_name} lacks CPU feature {function:#x}.{index} {} bit {bit}{name}",
                register.name()
            ));
        }
    }
}

fn cpuid_layout(from: (&str, &HostCaps), to: (&str, &HostCaps), out: &mut Vec<String>) {
    let ((from_name, source), (to_name, target)) = (from, to);
    let xsave = |l: &&CpuidLeaf| l.function == 0xd && l.index >= 2 && l.eax != 0;
    for leaf in source.cpuid.iter().filter(xsave) {
        let there = target.leaf(0xd, leaf.index).map(|l| (l.eax, l.ebx));
        // A component that is not there at all is reported as a missing XCR0 bit.
        if let Some((size, offset)) = there
            && (size, offset) != (leaf.eax, leaf.ebx)
        {
            out.push(format!(
                "XSAVE component {}: {} bytes at {} on {from_name}, {size} bytes at {offset} on {to_name}",
                leaf.index, leaf.eax, leaf.ebx
            ));
        }
    }
    let width = |caps: &HostCaps| caps.leaf(0x8000_0008, 0).map_or(36, |l| l.eax & 0xff);
    let (a, b) = (width(source), width(target));
    if a > b {
        out.push(format!(
            "physical addresses: {from_name} has {a} bits, {to_name} has {b}"
        ));
    }
}
