//! The paper's port map: nftables rewrites the destination port to that of the CPU's daemon,
//! conntrack restores it in the replies.
//!
//! All of it is in a table of the service's own, replaced in one transaction. Only the port is
//! rewritten (`dnat to :PORT`, not `redirect`, which would also put the interface's first address
//! in the place of the one the client asked for), and only of what is addressed to this machine.
//!
//! A daemon may die just before the table leaves it out. The chain `input` therefore drops a new
//! flow that was sent to a port where nobody listens, before conntrack has taken note of it: TCP's
//! next SYN, a second later, is then sent to another daemon, where the kernel's answer to this one
//! would have been "connection refused".

use super::{Instance, Service, Steer, netfilter};
use crate::error::{Error, Exit, Result};
use nftables::batch::Batch;
use nftables::expr::{
    CT, CTDir, Expression, Fib, FibFlag, FibResult, Map, Meta, MetaKey, NamedExpression, Payload,
    PayloadField, SetItem, Socket, SocketAttr,
};
use nftables::helper::{self, DEFAULT_ARGS, DEFAULT_NFT, NftablesError};
use nftables::schema::{Chain, FlushObject, NfCmd, NfListObject, Rule, Table};
use nftables::stmt::{JumpTarget, Match, NAT, Operator, Statement};
use nftables::types::{NfChainType, NfFamily, NfHook};
use serde_json::Value;
use std::borrow::Cow;
use std::collections::BTreeMap;

/// `dstnat`, where destinations are translated.
const DSTNAT: i32 = -100;
/// Before the `filter` chains of others: they see no flow that is dropped here.
const BEFORE_FILTER: i32 = -1;

#[derive(Default)]
pub struct Nat {
    /// Of the rules, when ours were last seen to be as they should be.
    generation: Option<u32>,
}

impl Steer for Nat {
    fn route(&mut self, service: &Service, table: &BTreeMap<u32, Instance>) -> Result<()> {
        let mut batch = Batch::new();
        batch.add(NfListObject::Table(own_table(service)));
        // Of all its chains; the chains stay, and with them the hooks.
        batch.add_cmd(NfCmd::Flush(FlushObject::Table(own_table(service))));
        for object in objects(service, table) {
            batch.add(object);
        }
        self.generation = None;
        helper::apply_ruleset(&batch.to_nftables()).map_err(|error| failed(service, error))
    }

    /// A firewall that is reloaded flushes all tables, as a rule.
    fn is_disturbed(&mut self, service: &Service, table: &BTreeMap<u32, Instance>) -> Result<bool> {
        // Before the comparison: what changes meanwhile is seen the next time.
        let generation = netfilter::generation()?;
        if self.generation == Some(generation) {
            return Ok(false);
        }
        let disturbed = !compare_own(objects_of(&current(service)?), service, table).is_empty();
        self.generation = (!disturbed).then_some(generation);
        Ok(disturbed)
    }

    fn remove(&mut self, service: &Service) -> Result<()> {
        let mut batch = Batch::new();
        // Deleting what is not there is an error, adding what is there is none.
        batch.add(NfListObject::Table(own_table(service)));
        batch.delete(NfListObject::Table(own_table(service)));
        helper::apply_ruleset(&batch.to_nftables()).map_err(|error| failed(service, error))
    }

    fn forget(&mut self, service: &Service, instance: &Instance) -> Result<()> {
        netfilter::forget(service.protocol, service.port, instance.port)
    }

    fn differences(
        &mut self,
        service: &Service,
        table: &BTreeMap<u32, Instance>,
    ) -> Result<Vec<String>> {
        let ruleset = current(service)?;
        let listed = objects_of(&ruleset);
        let mut lines = compare_own(listed, service, table);
        lines.extend(rivals(listed, service));
        Ok(lines)
    }
}

/// What `nft -j list ruleset` says.
fn current(service: &Service) -> Result<Value> {
    let ruleset = helper::get_current_ruleset_raw(DEFAULT_NFT, DEFAULT_ARGS)
        .map_err(|error| failed(service, error))?;
    serde_json::from_str(&ruleset)
        .map_err(|error| Error::new("nft", format_args!("answer not understood: {error}")))
}

/// Its objects.
fn objects_of(ruleset: &Value) -> &[Value] {
    ruleset["nftables"].as_array().map_or(&[], Vec::as_slice)
}

fn name(service: &Service) -> Cow<'static, str> {
    format!("cpubond-{}", service.name).into()
}

fn own_table(service: &Service) -> Table<'static> {
    Table {
        family: NfFamily::INet,
        name: name(service),
        handle: None,
    }
}

/// What the service's table consists of.
fn objects(service: &Service, table: &BTreeMap<u32, Instance>) -> Vec<NfListObject<'static>> {
    let chain = |chain: &'static str, hook: Option<(NfChainType, NfHook, i32)>| {
        NfListObject::Chain(Chain {
            family: NfFamily::INet,
            table: name(service),
            name: chain.into(),
            _type: hook.map(|(kind, ..)| kind),
            hook: hook.map(|(_, hook, _)| hook),
            prio: hook.map(|(.., prio)| prio),
            policy: hook.map(|_| nftables::types::NfChainPolicy::Accept),
            ..Chain::default()
        })
    };
    let rule = |chain: &'static str, expr: Vec<Statement<'static>>| {
        NfListObject::Rule(Rule {
            family: NfFamily::INet,
            table: name(service),
            chain: chain.into(),
            expr: expr.into(),
            ..Rule::default()
        })
    };
    let nat = NfChainType::NAT;
    let mut objects = vec![
        chain("prerouting", Some((nat, NfHook::Prerouting, DSTNAT))),
        chain("output", Some((nat, NfHook::Output, DSTNAT))),
        chain(
            "input",
            Some((NfChainType::Filter, NfHook::Input, BEFORE_FILTER)),
        ),
        chain("unheard", None),
    ];
    if !table.is_empty() {
        // Connections of the machine to itself start at the output hook.
        for hook in ["prerouting", "output"] {
            objects.push(rule(hook, translate(service, table)));
        }
    }
    objects.push(rule("input", is_steered(service)));
    objects.push(rule(
        "unheard",
        vec![somebody_listens(), Statement::Return(None)],
    ));
    objects.push(rule("unheard", vec![Statement::Drop(None)]));
    objects
}

/// `fib daddr type local tcp dport 80 dnat to :meta cpu map { 0 : 8000, … }`
fn translate(service: &Service, table: &BTreeMap<u32, Instance>) -> Vec<Statement<'static>> {
    let ports = table
        .iter()
        .map(|(cpu, instance)| {
            SetItem::Mapping(
                Expression::Number(*cpu),
                Expression::Number(instance.port.into()),
            )
        })
        .collect();
    vec![
        equal(
            NamedExpression::Fib(Fib {
                result: FibResult::Type,
                flags: [FibFlag::Daddr].into(),
            }),
            Expression::String("local".into()),
        ),
        equal(
            NamedExpression::Payload(Payload::PayloadField(PayloadField {
                protocol: service.protocol.to_string().into(),
                field: "dport".into(),
            })),
            Expression::Number(service.port.into()),
        ),
        Statement::DNAT(Some(NAT {
            addr: None,
            family: None,
            port: Some(Expression::Named(NamedExpression::Map(Box::new(Map {
                key: Expression::Named(NamedExpression::Meta(Meta { key: MetaKey::Cpu })),
                data: Expression::Named(NamedExpression::Set(ports)),
            })))),
            flags: None,
        })),
    ]
}

/// `ct state new ct status dnat meta l4proto tcp ct original proto-dst 80 jump unheard`
fn is_steered(service: &Service) -> Vec<Statement<'static>> {
    let conntrack = |key: &'static str, dir| {
        NamedExpression::CT(CT {
            key: key.into(),
            family: None,
            dir,
        })
    };
    let has = |key, flag: &'static str| {
        Statement::Match(Match {
            left: Expression::Named(conntrack(key, None)),
            right: Expression::String(flag.into()),
            op: Operator::IN,
        })
    };
    vec![
        has("state", "new"),
        has("status", "dnat"),
        equal(
            NamedExpression::Meta(Meta {
                key: MetaKey::L4proto,
            }),
            Expression::String(service.protocol.to_string().into()),
        ),
        equal(
            conntrack("proto-dst", Some(CTDir::Original)),
            Expression::Number(service.port.into()),
        ),
        Statement::Jump(JumpTarget {
            target: "unheard".into(),
        }),
    ]
}

/// `socket transparent { 0, 1 }`: true of every socket there is. (`socket wildcard` is not: it
/// takes one in TIME_WAIT, which a new connection may well meet, for none.)
fn somebody_listens() -> Statement<'static> {
    equal(
        NamedExpression::Socket(Socket {
            key: Cow::Owned(SocketAttr::Transparent),
        }),
        Expression::Named(NamedExpression::Set(
            [0, 1]
                .map(|value| SetItem::Element(Expression::Number(value)))
                .into(),
        )),
    )
}

fn equal(left: NamedExpression<'static>, right: Expression<'static>) -> Statement<'static> {
    Statement::Match(Match {
        left: Expression::Named(left),
        right,
        op: Operator::EQ,
    })
}

fn failed(service: &Service, error: NftablesError) -> Error {
    let place = format!("nft table inet {}", name(service));
    match error {
        NftablesError::NftExecution { inner, .. } => {
            Error::new(place, format_args!("nft cannot be run: {inner}"))
                .fix("install nftables")
                .exit(Exit::Unsupported)
        }
        NftablesError::NftFailed { stderr, .. } => {
            // The line after it shows where in the JSON, which says nothing to anybody.
            let line = stderr.lines().next().unwrap_or("no reason given");
            let error = Error::new(place, line.trim_start_matches("Error: "));
            match line.contains("not permitted") {
                true => error.fix("run as root"),
                false => error,
            }
        }
        error => Error::new(place, error),
    }
}

/// What of the service's table is missing, and what is there that should not be: a line each.
fn compare_own(
    listed: &[Value],
    service: &Service,
    table: &BTreeMap<u32, Instance>,
) -> Vec<String> {
    let own = name(service);
    let mut there: Vec<Value> = listed
        .iter()
        .filter(|object| of_table(object, &own))
        .map(without_handles)
        .collect();
    let mut lines = Vec::new();
    let wanted = std::iter::once(NfListObject::Table(own_table(service)))
        .chain(objects(service, table))
        .map(|object| without_handles(&serde_json::to_value(object).unwrap_or_default()));
    for object in wanted {
        match there.iter().position(|other| *other == object) {
            Some(index) => drop(there.remove(index)),
            None => lines.push(format!("nft table inet {own}: missing: {object}")),
        }
    }
    lines.extend(
        there
            .iter()
            .map(|object| format!("nft table inet {own}: not of cpubond: {object}")),
    );
    lines
}

/// Whether it is the table itself or something in it.
fn of_table(object: &Value, table: &str) -> bool {
    object.as_object().is_some_and(|object| {
        object.iter().any(|(kind, object)| {
            let key = if kind == "table" { "name" } else { "table" };
            object["family"] == "inet" && object[key] == table
        })
    })
}

/// The kernel numbers its objects.
fn without_handles(object: &Value) -> Value {
    let mut object = object.clone();
    for value in object
        .as_object_mut()
        .into_iter()
        .flatten()
        .map(|(_, value)| value)
    {
        if let Some(fields) = value.as_object_mut() {
            fields.remove("handle");
        }
    }
    object
}

/// A line for each rule of other tables that translates the service's port: of two such rules the
/// first that a packet meets wins.
fn rivals(listed: &[Value], service: &Service) -> Vec<String> {
    let own = name(service);
    listed
        .iter()
        .map(|object| &object["rule"])
        .filter(|rule| rule["table"] != *own)
        .filter(|rule| {
            let statements = rule["expr"].as_array().map_or(&[][..], Vec::as_slice);
            let translates = statements.iter().any(|statement| {
                ["dnat", "redirect", "tproxy"]
                    .iter()
                    .any(|kind| statement.get(kind).is_some())
            });
            let port = Value::from(service.port);
            let concerns = statements.iter().any(|statement| {
                let matched = &statement["match"];
                let set = matched["right"]["set"].as_array();
                let protocol = &matched["left"]["payload"]["protocol"];
                matched["left"]["payload"]["field"] == "dport"
                    && (*protocol == service.protocol.to_string() || protocol == "th")
                    && (matched["right"] == port || set.is_some_and(|set| set.contains(&port)))
            });
            translates && concerns
        })
        .map(|rule| {
            let word = |key: &str| rule[key].as_str().unwrap_or("?").to_string();
            format!(
                "nft table {} {} chain {} also translates {} {}",
                word("family"),
                word("table"),
                word("chain"),
                service.protocol,
                service.port
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::steer::Protocol;
    use serde_json::json;

    fn service() -> Service {
        Service {
            name: "web".to_string(),
            protocol: Protocol::Tcp,
            port: 80,
        }
    }

    fn table(ports: &[(u32, u16)]) -> BTreeMap<u32, Instance> {
        ports
            .iter()
            .map(|(cpu, port)| {
                let instance = Instance {
                    cpu: *cpu,
                    port: *port,
                    pid: 1,
                    sockets: vec![1],
                };
                (*cpu, instance)
            })
            .collect()
    }

    /// As `nft -j list ruleset` has it, handles and all.
    fn listed(service: &Service, table: &BTreeMap<u32, Instance>) -> Vec<Value> {
        std::iter::once(NfListObject::Table(own_table(service)))
            .chain(objects(service, table))
            .zip(1..)
            .map(|(object, handle)| {
                let mut object = serde_json::to_value(object).unwrap();
                for (_, fields) in object.as_object_mut().unwrap() {
                    fields["handle"] = handle.into();
                }
                object
            })
            .collect()
    }

    #[test]
    fn says_what_nft_understands() {
        let rule = serde_json::to_value(translate(&service(), &table(&[(0, 8000), (1, 8001)])));
        assert_eq!(
            rule.unwrap(),
            json!([
                {"match": {"op": "==", "right": "local",
                    "left": {"fib": {"result": "type", "flags": ["daddr"]}}}},
                {"match": {"op": "==", "right": 80,
                    "left": {"payload": {"protocol": "tcp", "field": "dport"}}}},
                {"dnat": {"port": {"map": {"key": {"meta": {"key": "cpu"}},
                    "data": {"set": [[0, 8000], [1, 8001]]}}}}}
            ])
        );
    }

    #[test]
    fn nobody_live_is_no_rule() {
        let translated = |table: &BTreeMap<u32, Instance>| {
            let text = serde_json::to_string(&listed(&service(), table)).unwrap();
            text.matches("\"dnat\":").count()
        };
        assert_eq!(translated(&table(&[])), 0);
        assert_eq!(translated(&table(&[(0, 8000)])), 2);
    }

    #[test]
    fn tells_what_is_not_as_it_should_be() {
        let wanted = table(&[(0, 8000), (1, 8001)]);
        let differences = |objects: Vec<Value>| {
            compare_own(&objects, &service(), &wanted).len() + rivals(&objects, &service()).len()
        };
        let good = listed(&service(), &wanted);
        assert_eq!(differences(good.clone()), 0);
        assert_eq!(differences(Vec::new()), good.len());
        // Another table: what is there is wrong, what should be is missing, at both hooks.
        assert_eq!(differences(listed(&service(), &table(&[(0, 8000)]))), 4);
        let mut more = good.clone();
        more.push(
            json!({"rule": {"family": "inet", "table": "cpubond-web", "chain": "input",
            "expr": [{"accept": null}]}}),
        );
        assert_eq!(differences(more), 1);
        // Tables of others may hold what they like,
        let mut others = good.clone();
        others.push(json!({"table": {"family": "ip", "name": "cpubond-web"}}));
        others.push(json!({"chain": {"family": "inet", "table": "mine", "name": "input"}}));
        assert_eq!(differences(others), 0);
        // but not translate the service's port.
        let rival = |port: Value, verdict: Value| {
            let mut objects = good.clone();
            objects.push(
                json!({"rule": {"family": "ip", "table": "nat", "chain": "pre",
                "expr": [{"match": {"op": "==", "right": port,
                    "left": {"payload": {"protocol": "tcp", "field": "dport"}}}}, verdict]}}),
            );
            differences(objects)
        };
        let redirect = json!({"redirect": {"port": 9}});
        assert_eq!(rival(json!(80), redirect.clone()), 1);
        assert_eq!(rival(json!({"set": [80, 443]}), redirect.clone()), 1);
        assert_eq!(rival(json!(81), redirect), 0);
        assert_eq!(rival(json!(80), json!({"accept": null})), 0);
    }
}
