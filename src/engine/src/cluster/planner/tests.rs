mod cases;
mod settling;
pub(in crate::cluster) mod world;
