//! Disks whose power is cut: what a program may rely on, and what it may not.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use redb::{Database, ReadableDatabase, ReadableTableMetadata, TableDefinition};
use testkit::fuse::{Disk, Harm, Op, SECTOR};
use testkit::require_disks;

fn disk() -> (tempfile::TempDir, Disk) {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::new(dir.path(), &["log"]).unwrap();
    (dir, disk)
}

fn durable(path: &Path, bytes: &[u8]) {
    let mut file = File::create(path).unwrap();
    file.write_all(bytes).unwrap();
    file.sync_all().unwrap();
}

/// The sectors of a file of 1s, made durable, that was overwritten with 2s before a cut.
fn overwritten(seed: u64) -> Vec<u8> {
    let (dir, mut disk) = disk();
    let path = dir.path().join("image");
    durable(&path, &[1; 16 << 10]);
    let file = File::options().write(true).open(&path).unwrap();
    for n in 0..4 {
        file.write_all_at(&[2; 4 << 10], n * (4 << 10)).unwrap();
    }
    disk.cut(seed);
    disk.power_on().unwrap();
    let bytes = fs::read(&path).unwrap();
    assert_eq!(bytes.len(), 16 << 10);
    let sectors = bytes.chunks(SECTOR as usize);
    sectors
        .map(|sector| {
            assert!(sector.iter().all(|b| *b == sector[0]), "torn inside");
            sector[0]
        })
        .collect()
}

#[test]
fn what_was_not_flushed_is_kept_lost_or_torn_and_a_seed_draws_the_same() {
    require_disks!();
    let mut seen = [false; 3];
    for seed in 0..24 {
        let sectors = overwritten(seed);
        assert_eq!(sectors, overwritten(seed), "seed {seed}");
        for block in sectors.chunks(8) {
            let new = block.iter().filter(|b| **b == 2).count();
            seen[usize::from(new > 0) + usize::from(new == 8)] = true;
        }
    }
    assert_eq!(seen, [true; 3], "lost, torn, kept");
}

#[test]
fn what_was_flushed_is_there_after_any_cut() {
    require_disks!();
    let (dir, mut disk) = disk();
    let path = |n: u64| dir.path().join(format!("vms/web{n}/vm.toml"));
    for seed in 0..24 {
        fs::create_dir_all(path(seed).parent().unwrap()).unwrap();
        durable(&path(seed), format!("{seed}").as_bytes());
        let log = dir.path().join("log");
        let mut log = File::options().create(true).append(true).open(log).unwrap();
        writeln!(log, "line {seed}").unwrap();
        disk.cut(seed);
        disk.power_on().unwrap();
        for before in 0..=seed {
            assert_eq!(
                fs::read(path(before)).unwrap(),
                format!("{before}").as_bytes()
            );
        }
    }
    let log = fs::read_to_string(dir.path().join("log")).unwrap();
    assert_eq!(log.lines().count(), 24, "{log}");
}

/// `settle` says whether the folder is flushed; gives what `name` holds after the cut.
fn renamed(seed: u64, settle: bool) -> String {
    let (dir, mut disk) = disk();
    let (new, name) = (dir.path().join("new"), dir.path().join("name"));
    durable(&name, b"old");
    durable(&new, b"new");
    fs::rename(&new, &name).unwrap();
    if settle {
        File::open(dir.path()).unwrap().sync_all().unwrap();
    }
    disk.cut(seed);
    disk.power_on().unwrap();
    fs::read_to_string(&name).unwrap()
}

#[test]
fn a_rename_is_kept_once_its_folder_was_flushed_and_may_be_lost_before() {
    require_disks!();
    let loose: Vec<String> = (0..24).map(|seed| renamed(seed, false)).collect();
    assert!(loose.contains(&"old".to_owned()) && loose.contains(&"new".to_owned()));
    assert!((0..24).all(|seed| renamed(seed, true) == "new"));
}

#[test]
fn a_removed_file_may_come_back_and_one_that_is_open_is_readable_meanwhile() {
    require_disks!();
    let mut back = [false; 2];
    for seed in 0..24 {
        let (dir, mut disk) = disk();
        let path = dir.path().join("file");
        durable(&path, b"bytes");
        let mut open = File::open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let mut text = String::new();
        open.read_to_string(&mut text).unwrap();
        assert_eq!(text, "bytes");
        disk.cut(seed);
        disk.power_on().unwrap();
        back[usize::from(path.exists())] = true;
    }
    assert_eq!(back, [true; 2]);
}

#[test]
fn after_a_cut_what_was_open_is_dead_and_its_locks_are_gone() {
    require_disks!();
    let (dir, mut disk) = disk();
    let path = dir.path().join("image");
    durable(&path, &[1; 512]);
    let open = File::options().read(true).write(true).open(&path).unwrap();
    open.try_lock().unwrap();
    assert!(File::open(&path).unwrap().try_lock().is_err());
    disk.cut(0);
    let mut byte = [0];
    assert!(open.read_at(&mut byte, 0).is_err());
    assert!(open.write_at(&byte, 0).is_err());
    assert!(open.sync_all().is_err());
    disk.power_on().unwrap();
    assert!(open.read_at(&mut byte, 0).is_err());
    File::open(&path).unwrap().try_lock().unwrap();
}

#[test]
fn holes_names_and_sockets_are_as_elsewhere() {
    use nix::fcntl::{FallocateFlags, fallocate};
    use nix::unistd::{Whence, lseek};
    require_disks!();
    let (dir, _disk) = disk();
    let path = dir.path().join("image");
    let image = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    image.set_len(1 << 20).unwrap();
    image.write_all_at(&[7; 8192], 4096).unwrap();
    assert_eq!(lseek(&image, 0, Whence::SeekData).unwrap(), 4096);
    assert_eq!(lseek(&image, 4096, Whence::SeekHole).unwrap(), 12288);
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&image, punch, 4096, 8192).unwrap();
    assert!(lseek(&image, 0, Whence::SeekData).is_err());
    assert_eq!(image.metadata().unwrap().len(), 1 << 20);

    let run = dir.path().join("run");
    fs::create_dir(&run).unwrap();
    let listener = UnixListener::bind(run.join("x.sock")).unwrap();
    let mut talk = UnixStream::connect(run.join("x.sock")).unwrap();
    talk.write_all(b"hi").unwrap();
    let mut heard = [0; 2];
    listener.accept().unwrap().0.read_exact(&mut heard).unwrap();
    for n in 0..500 {
        fs::write(run.join(format!("file{n}")), b"").unwrap();
    }
    assert_eq!(fs::read_dir(&run).unwrap().count(), 501);
    let error = fs::remove_dir(&run).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DirectoryNotEmpty);
    fs::remove_dir_all(&run).unwrap();
    let exists = File::options().write(true).create_new(true).open(&path);
    assert_eq!(exists.unwrap_err().kind(), ErrorKind::AlreadyExists);
}

#[test]
fn a_disk_fails_and_is_full_as_told_and_no_longer_than_that() {
    require_disks!();
    let (dir, mut disk) = disk();
    let image = dir.path().join("images/vm.img");
    fs::create_dir(image.parent().unwrap()).unwrap();
    durable(&image, &[1; 8192]);
    let file = File::options().read(true).write(true).open(&image).unwrap();
    let mut byte = [0];
    let number = |done: std::io::Result<usize>| done.map_err(|e| e.raw_os_error());

    disk.harm("images", &[Op::Read, Op::Write], Harm::Error);
    assert_eq!(number(file.read_at(&mut byte, 0)), Err(Some(libc::EIO)));
    assert_eq!(number(file.write_at(&byte, 0)), Err(Some(libc::EIO)));
    file.sync_all().unwrap();
    fs::write(dir.path().join("elsewhere"), b"x").unwrap();
    disk.lift();
    disk.harm("images", &Op::ALL, Harm::Full);
    assert_eq!(
        number(file.write_at(&[2; 4096], 8192)),
        Err(Some(libc::ENOSPC))
    );
    assert_eq!(number(file.write_at(&[2; 4096], 4096)), Ok(4096));
    let made = File::create(dir.path().join("images/other"));
    assert_eq!(made.unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    disk.lift();

    // What a failed fsync was to make durable is not, though the next one says nothing.
    file.write_all_at(&[3; 512], 0).unwrap();
    disk.harm("images", &[Op::Sync], Harm::Error);
    assert_eq!(
        file.sync_data().unwrap_err().raw_os_error(),
        Some(libc::EIO)
    );
    disk.lift();
    file.sync_data().unwrap();
    file.read_at(&mut byte, 0).unwrap();
    assert_eq!(byte, [3]);
    disk.cut(0);
    disk.power_on().unwrap();
    assert_eq!(fs::read(&image).unwrap()[0], 1);
}

#[test]
fn a_slow_disk_and_one_that_hangs_hold_up_only_who_asks() {
    require_disks!();
    let (dir, mut disk) = disk();
    let path = dir.path().join("image");
    durable(&path, &[1; 512]);
    let long = Duration::from_millis(150);
    let write = |byte: u8| {
        let path = path.clone();
        let (done, told) = mpsc::channel();
        std::thread::spawn(move || {
            let file = File::options().write(true).open(&path).unwrap();
            let _ = done.send(file.write_all_at(&[byte], 0));
        });
        told
    };
    disk.harm("image", &[Op::Write], Harm::Slow(long));
    let began = Instant::now();
    write(2).recv().unwrap().unwrap();
    assert!(began.elapsed() >= long);

    disk.harm("image", &[Op::Write], Harm::Hang);
    let hanging = write(3);
    fs::write(dir.path().join("other"), b"x").unwrap();
    assert_eq!(fs::read(&path).unwrap()[0], 2);
    assert!(hanging.recv_timeout(2 * long).is_err());
    disk.lift();
    hanging.recv().unwrap().unwrap();
    assert_eq!(fs::read(&path).unwrap()[0], 3);

    // A cut ends what hangs.
    disk.harm("image", &[Op::Write], Harm::Hang);
    let hanging = write(4);
    assert!(hanging.recv_timeout(long).is_err());
    disk.cut(0);
    assert!(hanging.recv().unwrap().is_err());
    disk.power_on().unwrap();
    assert_ne!(fs::read(&path).unwrap()[0], 4);
}

const TABLE: TableDefinition<u64, u64> = TableDefinition::new("t");

#[test]
fn redb_has_every_committed_transaction_after_fifty_cuts() {
    require_disks!();
    let (dir, mut disk) = disk();
    let path = dir.path().join("records.redb");
    let (mut lost, mut committed) = (0, 0);
    for seed in 0..50 {
        let db = Database::create(&path).unwrap();
        if seed > 0 {
            let table = db.begin_read().unwrap().open_table(TABLE).unwrap();
            let there = table.len().unwrap();
            // One more may have become durable without being told so.
            assert!(
                [committed, committed + 1].contains(&there),
                "{there} {committed}"
            );
            committed = there;
        }
        let (told, first) = mpsc::channel();
        let work = std::thread::spawn(move || {
            while add(&db, committed).is_ok() {
                committed += 1;
                let _ = told.send(());
            }
            // It would take this for an orderly end.
            std::mem::forget(db);
            committed
        });
        // Into the middle of a commit, as likely as not.
        first.recv().unwrap();
        std::thread::sleep(Duration::from_micros(seed * 40));
        lost += disk.cut(seed).lost;
        committed = work.join().unwrap();
        disk.power_on().unwrap();
    }
    assert!(lost > 0, "no cut has taken anything");
}

/// One transaction, durable when it returns.
fn add(db: &Database, n: u64) -> Result<(), redb::Error> {
    let txn = db.begin_write()?;
    txn.open_table(TABLE)?.insert(n, n)?;
    Ok(txn.commit()?)
}
