# Boot, tables and everything that runs in ring 0.
#
# Ring 0 may be emulated instruction by instruction, thousands of times slower than ring 3,
# and the emulator knows few instructions: this file stays small and plain.
#
# Per-CPU page i at PERCPU + i * 4096 (also laid out in percpu.rs):
#   0x000 task state segment   0x080 events (u64)   0x088 timer ticks (u64)
#   0x090 interrupts seen per I/O APIC pin (24 x u32, CPU 0 only)
#   0x100 fault record (vector, error code, rip, cr2, cs: 5 x u64)
#   0x140 kvmclock record (32 bytes, CPU 0 only)
#   0x200..0x400 ring-0 stack    0x800..0x901 I/O permission bitmap (zeros: ports below 0x800)

.set PERCPU,     0x100000
.set STUBS,      0x108000
.set CPUS,       8
.set PINS,       24
.set VEC_PIN,    0x30
.set VEC_TIMER,  0x50
.set VEC_WAKE,   0x58
.set LAPIC_EOI,  0xfee000b0
.set IO_BITMAP,  0x800                      # in the per-CPU page; IOPL 3 alone does not last on
                                            # a KVM without hardware virtualisation

# --- PVH entry note: type 18 = XEN_ELFNOTE_PHYS32_ENTRY
.section .note.pvh, "a", @note
    .balign 4
    .long 4, 8, 18
    .asciz "Xen"
    .quad pvh_start

# --- per-CPU pages
.section .percpu, "aw", @progbits
.set i, 0
.rept CPUS
    .long 0
    .quad PERCPU + i * 0x1000 + 0x400       # RSP0
    .fill 0x66 - 12, 1, 0
    .word IO_BITMAP
    .fill 0x1000 - 0x68, 1, 0               # the bitmap among it: every port below 0x800 allowed
    .set i, i + 1
.endr

# --- GDT, IDT, page tables: constants
.section .tables, "aw", @progbits
    .balign 4096
# Accessed and dirty bits are set beforehand, so the CPU never writes these pages.
pml4:
    .quad pdpt + 0x27
    .fill 511, 8, 0
pdpt:
    .set i, 0
    .rept 32
    .quad pd + i * 0x1000 + 0x27
    .set i, i + 1
    .endr
    .fill 480, 8, 0
pd:                                         # 32 GiB in 2 MiB pages, user and writable
    .set i, 0
    .rept 32 * 512
    .if (i >= 3 * 512) && (i < 4 * 512)
    .quad (i << 21) + 0xff                  # 3..4 GiB holds devices: uncached
    .else
    .quad (i << 21) + 0xe7
    .endif
    .set i, i + 1
    .endr

idt:
    .set i, 0
    .rept 256
    .word (STUBS + i * 64) & 0xffff
    .word 0x10
    .word 0x8e00
    .word (STUBS + i * 64) >> 16
    .quad 0
    .set i, i + 1
    .endr

gdt:
    .quad 0
    .quad 0x00cf9b000000ffff                # 0x08 ring 0 code, 32 bit
    .quad 0x00af9b000000ffff                # 0x10 ring 0 code, 64 bit
    .quad 0x00cf93000000ffff                # 0x18 ring 0 data
    .quad 0
    .quad 0x00cff3000000ffff                # 0x28 ring 3 data
    .quad 0x00affb000000ffff                # 0x30 ring 3 code, 64 bit
    .quad 0
    .set i, 0
    .rept CPUS                              # 0x40 + 16 * i: task state segments
    .word IO_BITMAP + 0x100
    .word (PERCPU + i * 0x1000) & 0xffff
    .byte (PERCPU + i * 0x1000) >> 16
    .byte 0x89, 0, 0
    .quad 0
    .set i, i + 1
    .endr
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word 256 * 16 - 1
    .quad idt
no_idt_pointer:
    .word 0
    .quad 0

# --- boot
.section .boot, "ax", @progbits
.code32
.globl pvh_start
pvh_start:                                  # ebx = hvm_start_info
    cli
    cld
    mov dword ptr [start_info], ebx
    lgdt [gdt_pointer]
enter_long_mode:                            # CPU number in [starting_cpu]
    mov eax, 0x620                          # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, 0xc0000080                     # EFER.LME
    xor edx, edx
    mov eax, 0x100
    wrmsr
    mov eax, 0x80050033
    mov cr0, eax
    .byte 0xea                              # ljmp 0x10:long_mode
    .long long_mode
    .word 0x10

.code64
long_mode:
    mov eax, 0x18
    mov ss, eax
    mov eax, 0x2b
    mov ds, eax
    mov es, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    lidt [idt_pointer]
    mov ebp, dword ptr [starting_cpu]
    mov eax, ebp
    shl eax, 4
    add eax, 0x40
    ltr ax
    mov eax, ebp
    shl eax, 12
    lea rsp, [rax + PERCPU + 0x400]
    test ebp, ebp
    jnz 2f

    mov al, 0xff                            # no interrupt from the 8259s
    out 0x21, al
    out 0xa1, al

    mov eax, 0x40000000                     # kvmclock, where KVM offers it
    cpuid
    cmp ebx, 0x4b4d564b
    jne 2f
    mov eax, 0x40000001
    cpuid
    test eax, 8
    jz 2f
    mov dword ptr [kvmclock_offered], 1
    mov ecx, 0x4b564d01                     # MSR_KVM_SYSTEM_TIME_NEW
    xor edx, edx
    mov eax, PERCPU + 0x140 + 1
    wrmsr
2:
    mov rax, qword ptr [starting_stack]
    push 0x2b
    push rax
    push 0x3202                             # IF, IOPL 3
    push 0x33
    mov rax, offset ring3_start
    push rax
    mov edi, ebp
    iretq

# Copied below 1 MiB for the start-up IPI; runs in real mode with CS:0 = its first byte.
.code16
.globl ap_start, ap_start_end
    .balign 16
ap_start:
    jmp 6f
    .balign 8
    .word gdt_end - gdt - 1                 # at offset 8
    .long gdt
6:
    cli
    .byte 0x2e, 0x66, 0x0f, 0x01, 0x16      # lgdtd cs:[8]
    .word 8
    mov eax, cr0
    or eax, 1
    mov cr0, eax
    .byte 0x66, 0xea                        # ljmp 0x08:ap_protected
    .long ap_protected
    .word 0x08
ap_start_end:

.code32
ap_protected:
    mov eax, 0x18
    mov ds, eax
    mov es, eax
    mov ss, eax
    jmp enter_long_mode

# --- interrupt stubs: 64 bytes each, vector v at STUBS + 64 v
.code64
.section .stubs, "ax", @progbits
.set v, 0
.rept 256
    .balign 64
    .if v == 13
    cmp qword ptr [rsp + 8], offset ring3_halt
    je halt
    jmp general_protection
    .elseif (v == 8) || (v == 10) || (v == 11) || (v == 12) || (v == 14) || (v == 17) || (v == 21)
    push v
    jmp fault
    .elseif v < 32
    push 0
    push v
    jmp fault
    .elseif (v >= VEC_PIN) && (v < VEC_PIN + PINS)
    inc dword ptr [PERCPU + 0x90 + 4 * (v - VEC_PIN)]
    inc qword ptr [PERCPU + 0x80]
    addr32 mov dword ptr [LAPIC_EOI], 0
    iretq
    .elseif (v >= VEC_TIMER) && (v < VEC_TIMER + CPUS)
    inc qword ptr [PERCPU + 0x88 + 0x1000 * (v - VEC_TIMER)]
    inc qword ptr [PERCPU + 0x80 + 0x1000 * (v - VEC_TIMER)]
    addr32 mov dword ptr [LAPIC_EOI], 0
    iretq
    .elseif (v >= VEC_WAKE) && (v < VEC_WAKE + CPUS)
    inc qword ptr [PERCPU + 0x80 + 0x1000 * (v - VEC_WAKE)]
    addr32 mov dword ptr [LAPIC_EOI], 0
    iretq
    .else
    iretq                                   # spurious
    .endif
    .set v, v + 1
.endr
    .balign 64

.section .boot, "ax", @progbits
# HLT in ring 3 faults to here. rdi = address of this CPU's event count, rsi = the count the
# caller has dealt with. Interrupts are off (interrupt gate), so an event that came in
# between is seen by the compare, and one that comes after it ends the HLT.
halt:
    add rsp, 8
    cmp qword ptr [rdi], rsi
    jne 3f
    sti
    hlt
3:
    inc qword ptr [rsp]                     # step over the HLT
    iretq

general_protection:
    cmp qword ptr [rsp + 8], offset ring3_crash
    jne 4f
    lidt [no_idt_pointer]                   # asked for: triple fault
    ud2
4:
    push 13
# Any other exception goes on in ring 3, in fault_start, with the record in CPU 0's page.
fault:
    pop qword ptr [PERCPU + 0x100]
    pop qword ptr [PERCPU + 0x108]
    mov rax, qword ptr [rsp]
    mov qword ptr [PERCPU + 0x110], rax
    mov rax, cr2
    mov qword ptr [PERCPU + 0x118], rax
    mov rax, qword ptr [rsp + 8]
    mov qword ptr [PERCPU + 0x120], rax
    mov rax, offset fault_start
    mov qword ptr [rsp], rax
    mov qword ptr [rsp + 8], 0x33
    mov qword ptr [rsp + 16], 0x3202
    mov rax, offset fault_stack_top
    mov qword ptr [rsp + 24], rax
    mov qword ptr [rsp + 32], 0x2b
    iretq

# --- ring 3
.section .text
.globl ring3_start
ring3_start:                                # edi = CPU number; stack top 16-byte aligned
    fninit
    test edi, edi
    jnz 5f
    mov edi, offset bss_start               # a reset does not clear memory
    mov ecx, offset bss_end
    sub ecx, edi
    xor eax, eax
    rep stosb
    xor edi, edi
5:
    xor ebp, ebp
    call {main}
    ud2

.globl wait_event
wait_event:                                 # (rdi = &events, rsi = events dealt with)
ring3_halt:
    hlt
    ret

.globl triple_fault
triple_fault:
ring3_crash:
    hlt
    ud2

fault_start:
    xor ebp, ebp
    call {fault}
    ud2

.section .data
    .balign 8
.globl start_info, starting_cpu, starting_stack, kvmclock_offered
start_info:       .long 0
starting_cpu:     .long 0
starting_stack:   .quad boot_stack_top
kvmclock_offered: .long 0

.section .stacks, "aw", @nobits
    .balign 4096
    .skip 0x20000
boot_stack_top:
    .skip 0x4000
fault_stack_top:
