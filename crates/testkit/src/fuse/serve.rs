//! The kernel's requests, answered from the [`Tree`](super::tree::Tree).
//!
//! One thread takes them in order; one that has to wait waits in a thread of its own. Files are opened for
//! direct I/O, so that every read and write comes here and can go wrong.

use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner,
    OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

use super::Shared;
use super::content::{Change, Content};
use super::faults::{Op, Way};
use super::sparse::BLOCK;
use super::tree::{Facts, Folder, Kind, Tree, errno};

/// Nobody changes anything behind the kernel's back.
const KNOWN_FOR: Duration = Duration::from_secs(3600);
/// What it says to have, blocks.
const ROOM: u64 = 1 << 24;

/// One mount of a disk.
pub(super) struct Serve {
    shared: Arc<Shared>,
    life: u64,
}

fn code(error: &io::Error) -> Errno {
    Errno::from_i32(error.raw_os_error().unwrap_or(libc::EIO))
}

fn attr(tree: &Tree, number: u64) -> io::Result<FileAttr> {
    let node = tree.node(number)?;
    let (kind, size, taken) = match &node.kind {
        Kind::File(content) => {
            let now = content.now();
            (FileType::RegularFile, now.size(), now.taken())
        }
        Kind::Folder(_) => (FileType::Directory, BLOCK, BLOCK),
        Kind::Socket => (FileType::Socket, 0, 0),
    };
    let Facts {
        mode,
        uid,
        gid,
        changed,
    } = node.facts;
    Ok(FileAttr {
        ino: INodeNo(number),
        size,
        blocks: taken / 512,
        atime: changed,
        mtime: changed,
        ctime: changed,
        crtime: SystemTime::UNIX_EPOCH,
        kind,
        perm: mode,
        nlink: if kind == FileType::Directory { 2 } else { 1 },
        uid,
        gid,
        rdev: 0,
        blksize: BLOCK as u32,
        flags: 0,
    })
}

impl Serve {
    pub(super) fn new(shared: Arc<Shared>) -> Serve {
        let life = shared.faults.life();
        Serve { shared, life }
    }

    /// Does `work` when, and in the way, the disk's harms let it.
    fn when_due(
        &self,
        path: &Path,
        op: Op,
        work: impl FnOnce(&mut Tree, io::Result<Way>) + Send + 'static,
    ) {
        let faults = &self.shared.faults;
        if let Some(way) = faults.at_once(self.life, path, op) {
            return work(&mut self.shared.tree(), way);
        }
        let (shared, life, path) = (Arc::clone(&self.shared), self.life, path.to_path_buf());
        let wait = move || {
            let way = shared.faults.wait(life, &path, op);
            work(&mut shared.tree(), way);
        };
        let waiting = std::thread::Builder::new().name("disk-wait".into());
        if let Err(e) = waiting.spawn(wait) {
            // What was asked is dropped with its reply, which answers with an error.
            tracing::error!("a slow disk's thread: {e}");
        }
    }

    fn of(
        &self,
        number: INodeNo,
        op: Op,
        work: impl FnOnce(&mut Tree, io::Result<Way>) + Send + 'static,
    ) {
        let path = self.shared.tree().path(number.0);
        self.when_due(&path, op, work);
    }

    fn of_name(
        &self,
        parent: INodeNo,
        name: &OsStr,
        work: impl FnOnce(&mut Tree, io::Result<Way>) + Send + 'static,
    ) {
        let path = self.shared.tree().path(parent.0).join(name);
        self.when_due(&path, Op::Names, work);
    }

    fn make(
        &self,
        req: &Request,
        (parent, name): (INodeNo, &OsStr),
        kind: Kind,
        mode: u32,
        answer: impl FnOnce(io::Result<FileAttr>) + Send + 'static,
    ) {
        let facts = Facts {
            mode: (mode & 0o7777) as u16,
            uid: req.uid(),
            gid: req.gid(),
            changed: SystemTime::now(),
        };
        let name = name.to_owned();
        self.of_name(parent, &name.clone(), move |tree, way| {
            let made = way.and_then(|way| tree.make((parent.0, &name), kind, facts, way));
            answer(made.and_then(|number| attr(tree, number)));
        });
    }

    fn sync(&self, number: INodeNo, reply: ReplyEmpty) {
        self.of(number, Op::Sync, move |tree, way| {
            let done = match way {
                Ok(_) => tree.sync(number.0),
                Err(e) => {
                    tree.sync_failed(number.0);
                    Err(e)
                }
            };
            empty(reply, done);
        });
    }
}

fn empty(reply: ReplyEmpty, done: io::Result<()>) {
    match done {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(code(&e)),
    }
}

fn entry(reply: ReplyEntry, found: io::Result<FileAttr>) {
    match found {
        Ok(attr) => reply.entry(&KNOWN_FOR, &attr, Generation(0)),
        Err(e) => reply.error(code(&e)),
    }
}

impl Filesystem for Serve {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let mut tree = self.shared.tree();
        let found = tree.look_up(parent.0, name);
        entry(reply, found.and_then(|number| attr(&tree, number)));
    }

    fn forget(&self, _: &Request, number: INodeNo, times: u64) {
        self.shared.tree().forget(number.0, times);
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match attr(&self.shared.tree(), number.0) {
            Ok(attr) => reply.attr(&KNOWN_FOR, &attr),
            Err(e) => reply.error(code(&e)),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        number: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        self.of(number, Op::Write, move |tree, way| {
            let resize = |way| match size {
                Some(size) => tree.change(number.0, Change::Size(size), way),
                None => Ok(()),
            };
            let done = way.and_then(resize).and_then(|()| {
                tree.set_facts(number.0, |facts| {
                    facts.mode = mode.map_or(facts.mode, |mode| (mode & 0o7777) as u16);
                    facts.uid = uid.unwrap_or(facts.uid);
                    facts.gid = gid.unwrap_or(facts.gid);
                    facts.changed = match mtime {
                        Some(TimeOrNow::SpecificTime(time)) => time,
                        Some(TimeOrNow::Now) => SystemTime::now(),
                        None => facts.changed,
                    };
                })
            });
            match done.and_then(|()| attr(tree, number.0)) {
                Ok(attr) => reply.attr(&KNOWN_FOR, &attr),
                Err(e) => reply.error(code(&e)),
            }
        });
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        let kind = match mode & libc::S_IFMT {
            libc::S_IFSOCK => Kind::Socket,
            libc::S_IFREG => Kind::File(Content::default()),
            _ => return reply.error(Errno::EPERM),
        };
        self.make(req, (parent, name), kind, mode & !umask, |made| {
            entry(reply, made);
        });
    }

    fn mkdir(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let kind = Kind::Folder(Folder::default());
        self.make(req, (parent, name), kind, mode & !umask, |made| {
            entry(reply, made);
        });
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let kind = Kind::File(Content::default());
        self.make(
            req,
            (parent, name),
            kind,
            mode & !umask,
            |made| match made {
                Ok(attr) => {
                    let direct = FopenFlags::FOPEN_DIRECT_IO;
                    reply.created(&KNOWN_FOR, &attr, Generation(0), FileHandle(0), direct);
                }
                Err(e) => reply.error(code(&e)),
            },
        );
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.to_owned();
        self.of_name(parent, &name.clone(), move |tree, way| {
            empty(reply, way.and_then(|_| tree.remove(parent.0, &name, false)));
        });
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.to_owned();
        self.of_name(parent, &name.clone(), move |tree, way| {
            empty(reply, way.and_then(|_| tree.remove(parent.0, &name, true)));
        });
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let replace = !flags.contains(RenameFlags::RENAME_NOREPLACE);
        if !(flags - RenameFlags::RENAME_NOREPLACE).is_empty() {
            return reply.error(Errno::EINVAL);
        }
        let (name, new) = (name.to_owned(), newname.to_owned());
        self.of_name(parent, &name.clone(), move |tree, way| {
            let (from, to) = ((parent.0, &*name), (newparent.0, &*new));
            empty(reply, way.and_then(|_| tree.rename(from, to, replace)));
        });
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.of(number, Op::Read, move |tree, way| {
            let bytes = |_| Ok(tree.content(number.0)?.now().read(offset, size.into()));
            match way.and_then(bytes) {
                Ok(bytes) => reply.data(&bytes),
                Err(e) => reply.error(code(&e)),
            }
        });
    }

    fn write(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let data = data.to_vec();
        self.of(number, Op::Write, move |tree, way| {
            let (at, len) = (offset, data.len() as u32);
            let write = |way| tree.change(number.0, Change::Write { at, data }, way);
            match way.and_then(write) {
                Ok(()) => reply.written(len),
                Err(e) => reply.error(code(&e)),
            }
        });
    }

    fn fsync(&self, _: &Request, number: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.sync(number, reply);
    }

    fn fsyncdir(&self, _: &Request, number: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.sync(number, reply);
    }

    fn fallocate(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let change = match mode {
            // As on a file system that takes room when it is written to.
            0 => Change::Size(offset.saturating_add(length)),
            m if m == libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE => Change::Punch {
                at: offset,
                len: length,
            },
            _ => return reply.error(Errno::EOPNOTSUPP),
        };
        self.of(number, Op::Write, move |tree, way| {
            let done = way.and_then(|way| {
                let size = tree.content(number.0)?.now().size();
                match change {
                    Change::Size(new) if new <= size => Ok(()),
                    change => tree.change(number.0, change, way),
                }
            });
            empty(reply, done);
        });
    }

    fn lseek(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let tree = self.shared.tree();
        let find = || {
            let now = tree.content(number.0)?.now();
            let at = u64::try_from(offset).map_err(|_| errno(libc::EINVAL))?;
            let found = match whence {
                _ if at >= now.size() => None,
                libc::SEEK_DATA => now.data(at),
                libc::SEEK_HOLE => Some(now.hole(at)),
                _ => return Err(errno(libc::EINVAL)),
            };
            let found = found.ok_or_else(|| errno(libc::ENXIO))?;
            i64::try_from(found).map_err(|_| errno(libc::EOVERFLOW))
        };
        match find() {
            Ok(at) => reply.offset(at),
            Err(e) => reply.error(code(&e)),
        }
    }

    fn readdir(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let tree = self.shared.tree();
        let names = match tree.list(number.0) {
            Ok(names) => names,
            Err(e) => return reply.error(code(&e)),
        };
        let dots = [(number.0, "."), (tree.parent(number.0), "..")];
        let dots = dots.map(|(number, name)| (number, name.into()));
        // A place in the list that stays when others go: a node's number, after those of the dots.
        let places = [1, 2]
            .into_iter()
            .chain(names.iter().map(|(number, _)| number + 2));
        let all = dots.iter().chain(&names).zip(places);
        for ((number, name), place) in all.filter(|(_, place)| *place > offset) {
            let kind = attr(&tree, *number).map_or(FileType::RegularFile, |attr| attr.kind);
            if reply.add(INodeNo(*number), place, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let block = BLOCK as u32;
        reply.statfs(ROOM, ROOM, ROOM, ROOM, ROOM, block, 255, block);
    }
}
