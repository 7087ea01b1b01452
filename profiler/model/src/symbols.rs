//! Kernel functions by address, from /proc/kallsyms.

use std::collections::BTreeMap;

/// The functions of a running kernel and its modules, by address.
#[derive(Debug, Default)]
pub struct Symbols {
    /// Sorted by address. One an address, the one to show.
    all: Vec<Symbol>,
    /// Further names of those addresses, with the place in `all`.
    aliases: Vec<(String, usize)>,
}

/// A function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Symbol {
    /// Where it begins.
    pub address: u64,
    /// Its name.
    pub name: String,
    /// Its module; none: the kernel itself.
    pub module: Option<String>,
}

impl Symbols {
    /// Read the text of /proc/kallsyms: `ADDRESS TYPE NAME` and, in a module, `[MODULE]`.
    /// Data is left out.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut found: BTreeMap<u64, Vec<_>> = BTreeMap::new();
        for (number, line) in (1..).zip(text.lines()) {
            let mut words = line.split_ascii_whitespace();
            let (Some(address), Some(kind), Some(name)) =
                (words.next(), words.next(), words.next())
            else {
                return Err(format!(
                    "kernel symbols, line {number}: '{line}': want 'ADDRESS TYPE NAME'"
                ));
            };
            let address = u64::from_str_radix(address, 16)
                .map_err(|_| format!("kernel symbols, line {number}: '{address}' is no address"))?;
            // Padding before functions has symbols of its own.
            if !matches!(kind, "t" | "T" | "w" | "W") || name.starts_with("__pfx_") {
                continue;
            }
            let module = words
                .next()
                .and_then(|word| word.strip_prefix('[')?.strip_suffix(']'));
            let global = kind != "t";
            found
                .entry(address)
                .or_default()
                .push((global, name, module));
        }
        if found.keys().all(|&address| address == 0) {
            return Err("kernel symbols: no addresses there; only root may read them".to_owned());
        }
        let mut symbols = Self::default();
        for (address, mut names) in found {
            // Global first, then the least decorated; the order is the same each time.
            names.sort_by_key(|&(global, name, _)| {
                (!global, name.starts_with('_'), name.len(), name)
            });
            for (place, (_, text, module)) in names.into_iter().enumerate() {
                if place == 0 {
                    symbols.all.push(Symbol {
                        address,
                        name: text.to_owned(),
                        module: module.map(str::to_owned),
                    });
                } else {
                    symbols
                        .aliases
                        .push((text.to_owned(), symbols.all.len() - 1));
                }
            }
        }
        Ok(symbols)
    }

    /// The function that an address is in: sizes are not known, so the nearest below.
    pub fn at(&self, address: u64) -> Option<&Symbol> {
        let after = self.all.partition_point(|symbol| symbol.address <= address);
        self.all.get(after.checked_sub(1)?)
    }

    /// Where functions of a name begin. The name may have `MODULE:` in front and lack what
    /// the compiler appended; `.cold` parts are no functions.
    pub fn find(&self, name: &str) -> Vec<u64> {
        let (module, name) = match name.split_once(':') {
            Some((module, name)) => (Some(module), name),
            None => (None, name),
        };
        let is_it = |full: &str| {
            full.strip_prefix(name)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
                && !full.contains(".cold")
        };
        let named = self.all.iter().filter(|symbol| is_it(&symbol.name));
        let aliased = self
            .aliases
            .iter()
            .filter(|(alias, _)| is_it(alias))
            .map(|&(_, place)| &self.all[place]);
        named
            .chain(aliased)
            .filter(|symbol| module.is_none() || symbol.module.as_deref() == module)
            .map(|symbol| symbol.address)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
0000000000000000 A fixed_percpu_data
ffffffff81000000 T _stext
ffffffff81000100 t __memset
ffffffff81000100 T memset
ffffffff81000200 t start_xmit
ffffffff81000300 D jiffies
ffffffff81000400 t helper.constprop.0
ffffffff81000500 t helper.cold
ffffffffc0001000 t start_xmit\t[virtio_net]
ffffffffc0000ff0 t __pfx_start_xmit\t[virtio_net]
";

    #[test]
    fn an_address_is_in_the_nearest_function_below() {
        let symbols = Symbols::parse(TEXT).expect("parses");
        let name = |address| symbols.at(address).map(|symbol| symbol.name.as_str());
        assert_eq!(name(0xffff_ffff_8100_0100), Some("memset"));
        assert_eq!(name(0xffff_ffff_8100_01ff), Some("memset"));
        assert_eq!(name(0xffff_ffff_8100_0350), Some("start_xmit"));
        assert_eq!(name(0x1000), None);
        let inside = symbols.at(0xffff_ffff_c000_1234).expect("found");
        assert_eq!(inside.module.as_deref(), Some("virtio_net"));
    }

    #[test]
    fn names_are_found_by_module_alias_and_without_suffix() {
        let symbols = Symbols::parse(TEXT).expect("parses");
        assert_eq!(symbols.find("start_xmit").len(), 2);
        assert_eq!(
            symbols.find("virtio_net:start_xmit"),
            [0xffff_ffff_c000_1000]
        );
        assert_eq!(symbols.find("__memset"), [0xffff_ffff_8100_0100]);
        assert_eq!(symbols.find("helper"), [0xffff_ffff_8100_0400]);
        assert!(symbols.find("help").is_empty());
    }

    #[test]
    fn bad_text_says_where() {
        let error = Symbols::parse("ffffffff81000000 T a\nxyz T b\n").expect_err("bad");
        assert!(error.contains("line 2"), "{error}");
        assert!(Symbols::parse("0000000000000000 T a\n").is_err());
        assert!(Symbols::parse("").is_err());
    }
}
