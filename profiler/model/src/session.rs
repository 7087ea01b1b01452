//! The open region: what was asked for, by the addresses of the running kernel.

use crate::block::{Block, Meaning};
use crate::class::{Class, class_of, place_of};
use crate::context::Place;
use crate::cpu::Point;
use crate::region::{PATH_ENTRIES, REGION_FILE, Region, SYMBOLS_FILE};
use crate::symbols::Symbols;
use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// A region that is open.
pub struct Session {
    /// What was asked for.
    pub region: Region,
    /// From 1; blocks remember for which one they were looked up.
    pub number: u16,
    symbols: Symbols,
    marks: HashSet<u64>,
    path_entries: HashSet<u64>,
    points: HashMap<u64, Vec<Point>>,
    functions: Mutex<Functions>,
}

/// Functions by number, in the order they were met.
#[derive(Default)]
struct Functions {
    /// Name and module.
    names: Vec<(String, Option<String>)>,
    numbers: HashMap<u64, u32>,
}

/// The number of what is in user space.
const USER: u32 = 0;

impl Session {
    /// From the files the helper wrote into the plugin's directory.
    pub fn read(dir: &Path, number: u16) -> Result<Self, String> {
        let text = |name: &str| {
            let path = dir.join(name);
            fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))
        };
        let region: Region = serde_json::from_str(&text(REGION_FILE)?)
            .map_err(|error| format!("{REGION_FILE}: {error}"))?;
        Self::new(region, &text(SYMBOLS_FILE)?, number)
    }

    /// From a region and the text of /proc/kallsyms.
    pub fn new(region: Region, symbols: &str, number: u16) -> Result<Self, String> {
        region.check()?;
        let symbols = Symbols::parse(symbols)?;
        let find = |name: &str| {
            let found = symbols.find(name);
            if found.is_empty() {
                Err(format!("the guest's kernel has no function '{name}'"))
            } else {
                Ok(found)
            }
        };
        let mut marks = HashSet::new();
        for name in &region.marks {
            marks.extend(find(name)?);
        }
        let mut path_entries = marks.clone();
        if region.path_entries.is_empty() {
            // Those that are there.
            path_entries.extend(PATH_ENTRIES.iter().flat_map(|name| symbols.find(name)));
        }
        for name in &region.path_entries {
            path_entries.extend(find(name)?);
        }
        let mut points: HashMap<u64, Vec<Point>> = HashMap::new();
        for (number, (from, to)) in region.ranges.iter().enumerate() {
            // The end first: where both are the same function, one range ends there
            // before the next begins.
            for address in find(to)? {
                points.entry(address).or_default().push(Point::To(number));
            }
            for address in find(from)? {
                points.entry(address).or_default().push(Point::From(number));
            }
        }
        let mut functions = Functions::default();
        functions.names.push(("user".to_owned(), None));
        if let Some((first, end)) = region.watch {
            let lines = (end.saturating_sub(1) >> 6) - (first >> 6) + 1;
            functions
                .names
                .extend((0..lines).map(|line| (format!("line:{line}"), None)));
        }
        Ok(Self {
            region,
            number,
            symbols,
            marks,
            path_entries,
            points,
            functions: Mutex::new(functions),
        })
    }

    /// Watched addresses, and the function of their first line.
    pub fn watch(&self) -> Option<(u64, u64, u32)> {
        self.region.watch.map(|(first, end)| (first, end, USER + 1))
    }

    /// What a block means here.
    pub fn meaning(&self, block: &Block) -> Meaning {
        if block.is_user() {
            return Meaning {
                function: USER,
                class: Class::User,
                entry: false,
                place: Place::User,
                mark: false,
                range: false,
            };
        }
        let Some(symbol) = self.symbols.at(block.pc) else {
            return Meaning {
                function: self.number_of(0, "unknown", None),
                class: Class::Path,
                entry: false,
                place: Place::Plain,
                mark: false,
                range: false,
            };
        };
        let entry = symbol.address == block.pc;
        let mut place = place_of(symbol, entry, block.iret);
        if place == Place::Plain && self.path_entries.contains(&block.pc) {
            place = Place::PathEntry;
        }
        Meaning {
            function: self.number_of(symbol.address, &symbol.name, symbol.module.as_deref()),
            class: class_of(symbol),
            entry,
            place,
            mark: self.marks.contains(&block.pc),
            range: self.points.contains_key(&block.pc),
        }
    }

    /// What ranges begin and end at an address.
    pub fn points(&self, pc: u64) -> &[Point] {
        self.points.get(&pc).map_or(&[], Vec::as_slice)
    }

    /// Functions met up to now.
    pub fn functions(&self) -> Vec<(String, Option<String>)> {
        self.functions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .names
            .clone()
    }

    fn number_of(&self, address: u64, name: &str, module: Option<&str>) -> u32 {
        let mut functions = self
            .functions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let next = functions.names.len() as u32;
        let number = *functions.numbers.entry(address).or_insert(next);
        if number == next {
            functions
                .names
                .push((name.to_owned(), module.map(str::to_owned)));
        }
        number
    }
}
