mod cases;
mod settling;
mod world;
