//! Prints the registers of a function, as `docs/pci-function.md` shows them.
//!
//! ```text
//! cargo run --example config_space -- edu
//! cargo run --example config_space -- ivshmem,size=4K
//! cargo run --example config_space -- everything
//! ```

use std::error::Error;
use std::fmt::Write as _;
use std::io::Write as _;

use barkeep_backend::devices::Registry;
use barkeep_backend::pci::{Function, FunctionSpec, Register};

mod everything;

fn main() -> Result<(), Box<dyn Error>> {
    let name = std::env::args().nth(1).ok_or("usage: config_space DEVICE|everything")?;
    let table = table(&Function::new(spec(&name)?)?);
    Ok(std::io::stdout().write_all(table.as_bytes())?)
}

fn spec(name: &str) -> Result<FunctionSpec, Box<dyn Error>> {
    match name {
        "everything" => Ok(everything::spec()),
        device => Ok(Registry::default().create(device.parse()?)?.0.spec()),
    }
}

/// The registers as a table in Markdown; those that only ever read 0 in a line below it.
fn table(function: &Function) -> String {
    let mut text = String::from(
        "| offset | register | bytes | reset | read-write | write-1-to-clear | own | retained | sticky |\n\
         |---|---|---|---|---|---|---|---|---|\n",
    );
    let mut zero = Vec::new();
    for register in function.registers() {
        let Register { name, offset, width, .. } = register;
        let bytes = width.bytes();
        let values = [
            register.reset,
            register.read_write,
            register.write_one_to_clear,
            register.volatile,
            register.reset_retains,
            register.sticky,
        ];
        if values == [0; 6] {
            zero.push(format!("{name} (`{offset:#04x}`)"));
            continue;
        }
        let _ = write!(text, "| `{offset:#04x}` | {name} | {bytes} |");
        for value in values {
            let _ = match value {
                0 => write!(text, "  |"),
                _ => write!(text, " `{value:#0digits$x}` |", digits = 2 + 2 * bytes),
            };
        }
        text.push('\n');
    }
    let _ = writeln!(text, "\nRead-only zero: {}.", zero.join(", "));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_shows_the_registers_as_they_are() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/pci-function.md");
        let documentation = std::fs::read_to_string(path).unwrap();
        for name in ["edu", "everything"] {
            let table = table(&Function::new(spec(name).unwrap()).unwrap());
            let command = format!("cargo run --example config_space -- {name}");
            assert!(
                documentation.contains(&format!("\n\n{table}\n")),
                "docs/pci-function.md does not have what `{command}` prints:\n{table}"
            );
            assert!(documentation.contains(&command), "{command} is not told");
        }
        let tables = documentation.matches("| offset | register |").count();
        assert_eq!(tables, 2, "no table that nothing checks");
    }
}
