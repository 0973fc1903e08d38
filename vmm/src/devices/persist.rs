//! Saved state of all devices: to blocks, and back.

use ax_wire::state::{Block, StateReader, StateWriter};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::kinds::{self, Kind};
use super::platform::Platform;
use super::records::{DiskRecord, NetRecord, PlatformRecord, RngRecord, SerialRecord};
use super::serial::SerialPort;
use super::{DeviceSet, Error, net, platform, serial, transport};

/// Everything read and checked, before anything is changed.
#[derive(Default)]
struct Staged {
    nets: Vec<Option<net::Loaded>>,
    disks: Vec<Option<transport::Restored>>,
    rng: Option<transport::Restored>,
    serial: Option<serial::Restored>,
    platform: Option<platform::Restored>,
}

impl DeviceSet {
    /// Appends every device's state. Only while quiet; allocates nothing.
    ///
    /// # Errors
    /// Not quiet, or no room in the buffer.
    pub fn save(&self, out: &mut StateWriter<'_>) -> Result<(), Error> {
        let devices = &self.devices;
        if !devices.gate.is_closed() {
            return Err(Error::NotQuiet("saved"));
        }
        for (i, net) in (0u32..).zip(&devices.nets) {
            put(out, Kind::Net, i, &net.record())?;
        }
        for (i, disk) in (0u32..).zip(&devices.disks) {
            put(out, Kind::Disk, i, &disk.record())?;
        }
        if let Some(rng) = &devices.rng {
            put(out, Kind::Rng, 0, &rng.record())?;
        }
        put(out, Kind::Serial, 0, devices.serial.lock().record())?;
        put(out, Kind::Platform, 0, &devices.platform.lock().record())
    }

    /// Takes over the state of devices equally specified, saved by [`DeviceSet::save`], here or
    /// elsewhere. Blocks that are not devices' are skipped. After KVM's state (rule 11), with guest
    /// memory already as it was; touches no guest memory itself. Then [`DeviceSet::kick_all`].
    ///
    /// # Errors
    /// Running and not quiet; blocks damaged, missing, doubled, of another version or impossible.
    /// After an error nothing has changed.
    pub fn restore(&self, state: StateReader<'_>) -> Result<(), Error> {
        self.check_quiet("restored")?;
        let devices = &self.devices;
        let mut staged = Staged::default();
        staged.nets.resize_with(devices.nets.len(), || None);
        staged.disks.resize_with(devices.disks.len(), || None);
        for block in state {
            let block = block?;
            if (kinds::FIRST..=kinds::LAST).contains(&block.kind) {
                self.stage(&mut staged, &block)?;
            }
        }
        let Staged {
            nets,
            disks,
            rng,
            serial,
            platform,
        } = staged;
        let nets = nets.into_iter().collect::<Option<Vec<_>>>();
        let disks = disks.into_iter().collect::<Option<Vec<_>>>();
        let missing = |what: &str| Error::State {
            device: what.into(),
            why: "its block is missing".into(),
        };
        let (nets, disks) = (
            nets.ok_or(missing("a net"))?,
            disks.ok_or(missing("a disk"))?,
        );
        let (serial, platform) = (
            serial.ok_or(missing("the serial port"))?,
            platform.ok_or(missing("the platform"))?,
        );
        if rng.is_none() && devices.rng.is_some() {
            return Err(missing("the entropy device"));
        }
        devices
            .nets
            .iter()
            .zip(nets)
            .for_each(|(net, state)| net.load(state));
        devices
            .disks
            .iter()
            .zip(disks)
            .for_each(|(disk, state)| disk.load(state));
        if let (Some(device), Some(state)) = (&devices.rng, rng) {
            device.load(state);
        }
        devices.serial.lock().load(serial);
        devices.platform.lock().load(platform);
        Ok(())
    }

    fn stage(&self, staged: &mut Staged, block: &Block<'_>) -> Result<(), Error> {
        let refuse = |why: &str| Error::State {
            device: format!("device block {:#x} number {}", block.kind, block.index),
            why: why.into(),
        };
        if block.version != Kind::VERSION {
            let ours = Kind::VERSION;
            return Err(refuse(&format!(
                "version {}, this build reads {ours}",
                block.version
            )));
        }
        let index = block.index as usize;
        let devices = &self.devices;
        let absent = || refuse("there is no such device here");
        let doubled = match block.kind {
            kind if kind == Kind::Net.number() => {
                let net = devices.nets.get(index).ok_or_else(absent)?;
                let state = net
                    .check(&read::<NetRecord>(block).map_err(refuse)?)
                    .map_err(refuse)?;
                staged
                    .nets
                    .get_mut(index)
                    .and_then(|s| s.replace(state))
                    .is_some()
            }
            kind if kind == Kind::Disk.number() => {
                let disk = devices.disks.get(index).ok_or_else(absent)?;
                let state = disk.check(&read::<DiskRecord>(block).map_err(refuse)?);
                let state = state.map_err(refuse)?;
                staged
                    .disks
                    .get_mut(index)
                    .and_then(|s| s.replace(state))
                    .is_some()
            }
            kind if kind == Kind::Rng.number() => {
                let rng = devices
                    .rng
                    .as_ref()
                    .filter(|_| index == 0)
                    .ok_or_else(absent)?;
                let state = rng
                    .check(&read::<RngRecord>(block).map_err(refuse)?)
                    .map_err(refuse)?;
                staged.rng.replace(state).is_some()
            }
            kind if kind == Kind::Serial.number() => {
                let state = SerialPort::check(&read::<SerialRecord>(block).map_err(refuse)?);
                staged.serial.replace(state.map_err(refuse)?).is_some()
            }
            kind if kind == Kind::Platform.number() => {
                let state = Platform::check(&read::<PlatformRecord>(block).map_err(refuse)?);
                staged.platform.replace(state.map_err(refuse)?).is_some()
            }
            _ => return Err(refuse("unknown kind")),
        };
        if doubled {
            Err(refuse("it is there twice"))
        } else {
            Ok(())
        }
    }
}

fn put<T>(out: &mut StateWriter<'_>, kind: Kind, index: u32, record: &T) -> Result<(), Error>
where
    T: IntoBytes + Immutable,
{
    Ok(out.block(kind.number(), Kind::VERSION, index, record.as_bytes())?)
}

fn read<T: FromBytes + KnownLayout + Immutable>(block: &Block<'_>) -> Result<T, &'static str> {
    T::read_from_bytes(block.payload).map_err(|_| "its length is wrong")
}
