//! Tests of the devices, from the driver's side.
