mod config_policy;
mod function;
mod interrupts;
mod opening;
