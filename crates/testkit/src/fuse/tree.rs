//! Files and folders, their names now, and the names a power cut would leave at the least.
//!
//! Names are as durable as POSIX and common file systems promise, no more:
//! - `fsync` of a folder makes all its names durable, and the folder's own.
//! - `fsync` of a file makes its content durable, and the name it was made with (as ext4, XFS and Btrfs
//!   do, with the folders above it); not a name it was renamed to since.
//! - Of what has not become durable a cut leaves, in each folder, the changes before some moment: a
//!   journal keeps their order. What lies in the files is drawn apart from that, so a new name may come
//!   with an empty file.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::content::{Change, Content};
use super::faults::Way;
use super::{Loss, Lot};

/// The number of the topmost folder.
pub(super) const ROOT: u64 = 1;

pub(super) fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

#[derive(Debug, Clone)]
enum Renaming {
    Link(OsString, u64),
    Unlink(OsString),
    Rename(OsString, OsString),
}

#[derive(Debug, Clone, Default)]
pub(super) struct Folder {
    now: BTreeMap<OsString, u64>,
    durable: BTreeMap<OsString, u64>,
    pending: Vec<Renaming>,
}

impl Renaming {
    /// Gives the node that lost its name, if one did.
    fn apply(&self, to: &mut BTreeMap<OsString, u64>) -> Option<u64> {
        match self {
            Renaming::Link(name, node) => to.insert(name.clone(), *node),
            Renaming::Unlink(name) => to.remove(name),
            Renaming::Rename(from, name) => {
                let node = to.remove(from)?;
                to.insert(name.clone(), node)
            }
        }
    }
}

impl Folder {
    fn change(&mut self, change: Renaming) {
        change.apply(&mut self.now);
        self.pending.push(change);
    }

    /// Makes the first `count` changes durable; gives the nodes that lost their names.
    fn commit(&mut self, count: usize) -> Vec<u64> {
        let durable = &mut self.durable;
        let done = self.pending.drain(..count);
        done.filter_map(|change| change.apply(durable)).collect()
    }

    fn knows(&self, node: u64) -> bool {
        let linked = |change: &Renaming| matches!(change, Renaming::Link(_, n) if *n == node);
        let named = |names: &BTreeMap<_, u64>| names.values().any(|n| *n == node);
        named(&self.now) || named(&self.durable) || self.pending.iter().any(linked)
    }
}

#[derive(Debug, Clone)]
pub(super) enum Kind {
    File(Content),
    Folder(Folder),
    Socket,
}

/// Facts about a file beside its content.
#[derive(Debug, Clone, Copy)]
pub(super) struct Facts {
    /// Permission bits.
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) changed: SystemTime,
}

#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) kind: Kind,
    pub(super) facts: Facts,
    durable: Facts,
    parent: u64,
    name: OsString,
    /// How often the kernel was told of it and has not forgotten it.
    lookups: u64,
    /// Durable as soon as it is written: it is there for whoever looks for what went wrong.
    through: bool,
}

/// The whole file system.
#[derive(Debug)]
pub(super) struct Tree {
    nodes: BTreeMap<u64, Node>,
    next: u64,
    /// Names of files whose content is not lost.
    through: Vec<OsString>,
}

impl Tree {
    pub(super) fn new(through: &[&str]) -> Tree {
        let facts = Facts {
            mode: 0o755,
            uid: 0,
            gid: 0,
            changed: SystemTime::now(),
        };
        let root = Node {
            kind: Kind::Folder(Folder::default()),
            facts,
            durable: facts,
            parent: ROOT,
            name: OsString::new(),
            lookups: 0,
            through: false,
        };
        Tree {
            nodes: [(ROOT, root)].into(),
            next: ROOT + 1,
            through: through.iter().map(OsString::from).collect(),
        }
    }

    pub(super) fn node(&self, number: u64) -> io::Result<&Node> {
        let node = self.nodes.get(&number);
        node.ok_or_else(|| errno(libc::ESTALE))
    }

    fn node_mut(&mut self, number: u64) -> io::Result<&mut Node> {
        let node = self.nodes.get_mut(&number);
        node.ok_or_else(|| errno(libc::ESTALE))
    }

    fn folder(&self, number: u64) -> io::Result<&Folder> {
        match &self.node(number)?.kind {
            Kind::Folder(folder) => Ok(folder),
            _ => Err(errno(libc::ENOTDIR)),
        }
    }

    fn folder_mut(&mut self, number: u64) -> io::Result<&mut Folder> {
        match &mut self.node_mut(number)?.kind {
            Kind::Folder(folder) => Ok(folder),
            _ => Err(errno(libc::ENOTDIR)),
        }
    }

    fn change_names(&mut self, number: u64, change: Renaming) -> io::Result<()> {
        self.folder_mut(number)?.change(change);
        self.node_mut(number)?.facts.changed = SystemTime::now();
        Ok(())
    }

    pub(super) fn content(&self, number: u64) -> io::Result<&Content> {
        match &self.node(number)?.kind {
            Kind::File(content) => Ok(content),
            Kind::Folder(_) => Err(errno(libc::EISDIR)),
            Kind::Socket => Err(errno(libc::EINVAL)),
        }
    }

    /// Where a node lies, below the topmost folder.
    pub(super) fn path(&self, number: u64) -> PathBuf {
        let mut names = Vec::new();
        let mut at = number;
        while let Some(node) = self.nodes.get(&at).filter(|_| at != ROOT) {
            names.push(&node.name);
            at = node.parent;
        }
        names.iter().rev().collect()
    }

    /// The node of a name, of which the kernel will know.
    pub(super) fn look_up(&mut self, parent: u64, name: &OsStr) -> io::Result<u64> {
        let found = self.folder(parent)?.now.get(name).copied();
        let number = found.ok_or_else(|| errno(libc::ENOENT))?;
        self.node_mut(number)?.lookups += 1;
        Ok(number)
    }

    pub(super) fn forget(&mut self, number: u64, times: u64) {
        if let Some(node) = self.nodes.get_mut(&number) {
            node.lookups = node.lookups.saturating_sub(times);
        }
        self.collect(number);
    }

    /// Drops a node that nobody can come to any more.
    fn collect(&mut self, number: u64) {
        let Some(node) = self.nodes.get(&number) else {
            return;
        };
        let named = self.folder(node.parent).is_ok_and(|f| f.knows(number));
        if number != ROOT && node.lookups == 0 && !named {
            self.nodes.remove(&number);
        }
    }

    /// Names and nodes of a folder, by number.
    pub(super) fn list(&self, number: u64) -> io::Result<Vec<(u64, OsString)>> {
        let names = self.folder(number)?.now.iter();
        let mut all: Vec<_> = names.map(|(name, n)| (*n, name.clone())).collect();
        all.sort();
        Ok(all)
    }

    pub(super) fn parent(&self, number: u64) -> u64 {
        self.nodes.get(&number).map_or(ROOT, |node| node.parent)
    }

    pub(super) fn make(
        &mut self,
        (parent, name): (u64, &OsStr),
        kind: Kind,
        facts: Facts,
        way: Way,
    ) -> io::Result<u64> {
        if way == Way::Full {
            return Err(errno(libc::ENOSPC));
        }
        if self.folder(parent)?.now.contains_key(name) {
            return Err(errno(libc::EEXIST));
        }
        let number = self.next;
        self.next += 1;
        let node = Node {
            kind,
            facts,
            durable: facts,
            parent,
            name: name.to_owned(),
            lookups: 1,
            through: self.through.iter().any(|n| n == name),
        };
        self.nodes.insert(number, node);
        self.change_names(parent, Renaming::Link(name.to_owned(), number))?;
        Ok(number)
    }

    pub(super) fn remove(&mut self, parent: u64, name: &OsStr, folder: bool) -> io::Result<()> {
        let found = self.folder(parent)?.now.get(name).copied();
        let number = found.ok_or_else(|| errno(libc::ENOENT))?;
        self.may_go(number, folder)?;
        self.change_names(parent, Renaming::Unlink(name.to_owned()))
    }

    /// Whether a node may lose its name as a folder, or as something else.
    fn may_go(&self, number: u64, folder: bool) -> io::Result<()> {
        match (&self.node(number)?.kind, folder) {
            (Kind::Folder(_), false) => Err(errno(libc::EISDIR)),
            (Kind::Folder(f), true) if !f.now.is_empty() => Err(errno(libc::ENOTEMPTY)),
            (Kind::Folder(_), true) | (_, false) => Ok(()),
            (_, true) => Err(errno(libc::ENOTDIR)),
        }
    }

    /// Renames inside one folder; from one to another EXDEV, as if each were a disk.
    pub(super) fn rename(
        &mut self,
        (parent, name): (u64, &OsStr),
        (new_parent, new_name): (u64, &OsStr),
        replace: bool,
    ) -> io::Result<()> {
        if parent != new_parent {
            return Err(errno(libc::EXDEV));
        }
        let folder = self.folder(parent)?;
        let moved = folder.now.get(name).copied();
        let moved = moved.ok_or_else(|| errno(libc::ENOENT))?;
        match folder.now.get(new_name).copied() {
            Some(there) if there == moved => return Ok(()),
            Some(_) if !replace => return Err(errno(libc::EEXIST)),
            Some(there) => {
                let is_folder = matches!(self.node(moved)?.kind, Kind::Folder(_));
                self.may_go(there, is_folder)?;
            }
            None => {}
        }
        let change = Renaming::Rename(name.to_owned(), new_name.to_owned());
        self.change_names(parent, change)?;
        let through = self.through.iter().any(|n| n == new_name);
        let node = self.node_mut(moved)?;
        node.name = new_name.to_owned();
        node.through |= through;
        Ok(())
    }

    /// Changes a file's content.
    pub(super) fn change(&mut self, number: u64, change: Change, way: Way) -> io::Result<()> {
        let content = self.content(number)?;
        let fits = match &change {
            Change::Write { at, data } => content.now().has_room(*at, data.len() as u64),
            Change::Size(_) | Change::Punch { .. } => true,
        };
        if way == Way::Full && !fits {
            return Err(errno(libc::ENOSPC));
        }
        let node = self.node_mut(number)?;
        node.facts.changed = SystemTime::now();
        if let Kind::File(content) = &mut node.kind {
            content.change(change);
        }
        if node.through {
            self.sync(number)?;
        }
        Ok(())
    }

    pub(super) fn set_facts(
        &mut self,
        number: u64,
        change: impl FnOnce(&mut Facts),
    ) -> io::Result<()> {
        change(&mut self.node_mut(number)?.facts);
        Ok(())
    }

    /// `fsync`.
    pub(super) fn sync(&mut self, number: u64) -> io::Result<()> {
        let node = self.node_mut(number)?;
        node.durable = node.facts;
        let displaced = match &mut node.kind {
            Kind::File(content) => {
                content.flush();
                Vec::new()
            }
            Kind::Folder(folder) => folder.commit(folder.pending.len()),
            Kind::Socket => Vec::new(),
        };
        displaced.into_iter().for_each(|n| self.collect(n));
        self.name_is_durable(number);
        Ok(())
    }

    /// `fsync` has failed.
    pub(super) fn sync_failed(&mut self, number: u64) {
        if let Ok(node) = self.node_mut(number)
            && let Kind::File(content) = &mut node.kind
        {
            content.flush_failed();
        }
    }

    /// Makes the name durable that a node was made with, and those of the folders above it.
    fn name_is_durable(&mut self, number: u64) {
        let mut at = number;
        while at != ROOT {
            let parent = self.parent(at);
            let Ok(folder) = self.folder_mut(parent) else {
                return;
            };
            let its = |change: &Renaming| matches!(change, Renaming::Link(_, n) if *n == at);
            if let Some(place) = folder.pending.iter().position(its) {
                let displaced = folder.commit(place + 1);
                displaced.into_iter().for_each(|n| self.collect(n));
            }
            at = parent;
        }
    }

    /// What a power cut leaves. The kernel knows of nothing any more.
    pub(super) fn cut(&mut self, lot: &mut Lot) -> Loss {
        let mut loss = Loss::default();
        for node in self.nodes.values_mut() {
            if let Kind::Folder(folder) = &mut node.kind {
                let kept = lot.first_of(folder.pending.len());
                loss.names += folder.pending.len() - kept;
                folder.commit(kept);
                folder.pending.clear();
                folder.now = folder.durable.clone();
            }
        }
        let mut reached = BTreeSet::from([ROOT]);
        let mut names = vec![(ROOT, ROOT, OsString::new())];
        let mut to_do = vec![ROOT];
        while let Some(at) = to_do.pop() {
            for (number, name) in self.list(at).unwrap_or_default() {
                if reached.insert(number) {
                    names.push((number, at, name));
                    to_do.push(number);
                }
            }
        }
        self.nodes.retain(|number, _| reached.contains(number));
        for (number, parent, name) in names {
            if let Some(node) = self.nodes.get_mut(&number) {
                (node.parent, node.name, node.lookups) = (parent, name, 0);
            }
        }
        for node in self.nodes.values_mut() {
            if let Kind::File(content) = &mut node.kind {
                content.cut(lot, &mut loss);
            }
            match lot.keeps() {
                true => node.durable = node.facts,
                false => node.facts = node.durable,
            }
        }
        loss
    }

    /// Writes what is below a folder into another one, which is somewhere else.
    pub(super) fn copy_to(&self, number: u64, folder: &Path) -> io::Result<()> {
        for (number, name) in self.list(number)? {
            let path = folder.join(name);
            match &self.node(number)?.kind {
                Kind::Folder(_) => {
                    std::fs::create_dir_all(&path)?;
                    self.copy_to(number, &path)?;
                }
                Kind::File(content) => {
                    let bytes = content.now().read(0, content.now().size());
                    std::fs::write(&path, bytes)?;
                }
                Kind::Socket => {}
            }
        }
        Ok(())
    }
}
