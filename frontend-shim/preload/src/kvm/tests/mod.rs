mod kernel;
mod lifetime;
mod run;
mod slots;
mod world;
