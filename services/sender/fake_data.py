"""The invented customers and products that ``generate`` chooses from.

Phone numbers are from the ranges that a country reserves for fiction, if it has one. E-mail domains are reserved ones.
So no order contains the data of a real person.
"""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class Town:
    """A town of customers."""

    name: str
    region: str
    #: A format for postal codes. It may contain one number below ``ZIPS``.
    zip_format: str


@attrs.frozen(kw_only=True)
class People:
    """First names, and the surnames that fit them."""

    first_names: tuple[str, ...]
    surnames: tuple[str, ...]


@attrs.frozen(kw_only=True)
class Market:
    """A country's customers and how they pay."""

    #: Language tag.
    locale: str
    #: ISO 4217 code.
    currency: str
    #: Minor units of the currency for one cent of ``Product.price_cents``.
    rate: float
    #: A price is a multiple of this, in minor units, minus ``charm``.
    step: int
    #: What is subtracted from a round price, in minor units: 1 gives 9.99.
    charm: int
    people: tuple[People, ...]
    #: A format for a name, with ``first`` and ``last``.
    name_format: str
    #: A format for a number below ``PHONES``.
    phone_format: str
    towns: tuple[Town, ...]
    streets: tuple[str, ...]
    #: A format for an address, with ``street``, ``number`` and ``flat``.
    address_format: str
    carriers: tuple[str, ...]
    banks: tuple[str, ...]


@attrs.frozen(kw_only=True)
class Product:
    """A product in the items of orders."""

    brand: str
    name: str
    #: In cents. Each market converts it to its currency.
    price_cents: int
    #: Sizes, as the shop writes them.
    sizes: tuple[str, ...]


#: The exclusive limits of the random numbers in postal codes and phone numbers.
ZIPS = 100
PHONES = 1000

MARKETS = (
    Market(
        locale="en",
        currency="USD",
        rate=1.1,
        step=100,
        charm=1,
        people=(
            People(
                first_names=("Emma", "Olivia", "Zoë", "James", "Liam", "Noah", "Renée", "Amara", "Mateo", "Grace"),
                surnames=("Smith", "O'Brien", "Nguyen", "Johnson", "García", "D'Angelo", "Lee", "McCarthy-Jones"),
            ),
        ),
        name_format="{first} {last}",
        phone_format="+1-212-555-0{:03d}",
        towns=(
            Town(name="New York", region="NY", zip_format="100{:02d}"),
            Town(name="Coeur d'Alene", region="ID", zip_format="838{:02d}"),
            Town(name="San José", region="CA", zip_format="951{:02d}"),
            Town(name="St. Louis", region="MO", zip_format="631{:02d}"),
        ),
        streets=("Maple Avenue", "Main Street", "Martin Luther King Jr. Blvd", "Sunset Drive", "St. Mark's Place"),
        address_format="{number} {street}, Apt. {flat}",
        carriers=("ups", "fedex", "usps"),
        banks=("alpha", "First National", "Bank & Trust"),
    ),
    Market(
        locale="en-GB",
        currency="GBP",
        rate=0.85,
        step=100,
        charm=1,
        people=(
            People(
                first_names=("Siân", "Oliver", "Amelia", "Aoife", "George", "Niamh", "Priya", "Harry", "Isla"),
                surnames=("Jones", "O'Neill", "Patel", "Taylor", "MacDonald", "Ó Súilleabháin", "Brontë", "Davies"),
            ),
        ),
        name_format="{first} {last}",
        phone_format="+44 7700 900{:03d}",
        towns=(
            Town(name="London", region="Greater London", zip_format="N{:d} 1AA"),
            Town(name="King's Lynn", region="Norfolk", zip_format="PE{:d} 1NB"),
            Town(name="Caerdydd", region="Cymru", zip_format="CF{:d} 3AT"),
        ),
        streets=("High Street", "King's Road", "Church Lane", "Queen's Crescent", "Lôn y Felin"),
        address_format="Flat {flat}, {number} {street}",
        carriers=("royal mail", "evri", "dpd"),
        banks=("", "Albion", "Thames & Severn"),
    ),
    Market(
        locale="ru",
        currency="RUB",
        rate=95,
        step=1000,
        charm=100,
        people=(
            People(
                first_names=("Анна", "Мария", "Алёна", "Екатерина", "Зульфия", "Ольга"),
                surnames=("Иванова", "Соловьёва", "Кузнецова", "Петрова-Водкина", "Ахметова", "Щукина"),
            ),
            People(
                first_names=("Иван", "Пётр", "Дмитрий", "Алексей", "Тимур", "Семён"),
                surnames=("Иванов", "Соловьёв", "Кузнецов", "Римский-Корсаков", "Ахметов", "Щукин"),
            ),
        ),
        name_format="{first} {last}",
        phone_format="+7 900 000-0{:03d}",
        towns=(
            Town(name="Москва", region="", zip_format="1010{:02d}"),
            Town(name="Санкт-Петербург", region="", zip_format="1910{:02d}"),
            Town(name="Йошкар-Ола", region="Республика Марий Эл", zip_format="4240{:02d}"),
            Town(name="Орёл", region="Орловская область", zip_format="3020{:02d}"),
        ),
        streets=("ул. Ленина", "Невский проспект", "пл. Мира", "ул. 8 Марта", "Зелёный пер."),
        address_format="{street}, д. {number}, кв. {flat}",
        carriers=("meest", "сдэк", "почта"),
        banks=("alpha", "Сберегательный", "Восток"),
    ),
    Market(
        locale="de",
        currency="EUR",
        rate=1,
        step=100,
        charm=1,
        people=(
            People(
                first_names=("Jürgen", "Käthe", "Lukas", "Anneliese", "Björn", "Leonie", "Ümit", "Sören"),
                surnames=("Müller", "Weiß", "Schröder", "von der Heide", "Öztürk", "Groß", "Schmidt", "Bäcker"),
            ),
        ),
        name_format="{first} {last}",
        phone_format="+49 30 23125 {:03d}",
        towns=(
            Town(name="Berlin", region="", zip_format="101{:02d}"),
            Town(name="München", region="Bayern", zip_format="803{:02d}"),
            Town(name="Köln", region="Nordrhein-Westfalen", zip_format="506{:02d}"),
        ),
        streets=("Hauptstraße", "Grüner Weg", "Bahnhofstraße", "Straße des 17. Juni", "Am Mühlbach"),
        address_format="{street} {number}",
        carriers=("dhl", "hermes", "dpd"),
        banks=("Sparkasse", "Volksbank", "alpha"),
    ),
    Market(
        locale="fr",
        currency="EUR",
        rate=1,
        step=100,
        charm=10,
        people=(
            People(
                first_names=("Chloé", "François", "Maëlys", "Noël", "Anaïs", "Jérôme", "Inès", "Théo"),
                surnames=("Lefèvre", "d'Aubigné", "N'Diaye", "Brûlé", "L'Hôpital", "Martin", "Garçon"),
            ),
        ),
        name_format="{first} {last}",
        phone_format="+33 6 39 98 0{:03d}",
        towns=(
            Town(name="Paris", region="Île-de-France", zip_format="75010"),
            Town(name="L'Haÿ-les-Roses", region="Île-de-France", zip_format="94240"),
            Town(name="Besançon", region="Bourgogne-Franche-Comté", zip_format="25000"),
        ),
        streets=("rue de l'Église", "avenue du Général-Leclerc", "quai d'Orsay", "impasse des Mûriers"),
        address_format="{number}, {street}",
        carriers=("colissimo", "chronopost"),
        banks=("Crédit d'Ouest", "", "alpha"),
    ),
    Market(
        locale="pl",
        currency="PLN",
        rate=4.3,
        step=100,
        charm=1,
        people=(
            People(
                first_names=("Małgorzata", "Zofia", "Agnieszka", "Łucja"),
                surnames=("Wiśniewska", "Dąbrowska", "Żak", "Gęś-Nowak"),
            ),
            People(
                first_names=("Paweł", "Stanisław", "Krzysztof", "Jędrzej"),
                surnames=("Wiśniewski", "Dąbrowski", "Żak", "Brzęczyszczykiewicz"),
            ),
        ),
        name_format="{first} {last}",
        phone_format="+48 600 000 {:03d}",
        towns=(
            Town(name="Łódź", region="łódzkie", zip_format="90-0{:02d}"),
            Town(name="Kraków", region="małopolskie", zip_format="30-0{:02d}"),
            Town(name="Gdańsk", region="pomorskie", zip_format="80-0{:02d}"),
        ),
        streets=("ul. Świętojańska", "al. Jana Pawła II", "ul. Źródlana", "pl. Wolności"),
        address_format="{street} {number}/{flat}",
        carriers=("inpost", "poczta"),
        banks=("Bank Śląski", "alpha", ""),
    ),
    Market(
        locale="ja",
        currency="JPY",
        rate=1.6,
        step=10,
        charm=0,
        people=(
            People(
                first_names=("陽菜", "蓮", "さくら", "健太", "美咲", "ひなた", "翔太"),
                surnames=("佐藤", "鈴木", "髙橋", "渡邊", "五十嵐", "小鳥遊"),
            ),
        ),
        name_format="{last} {first}",
        phone_format="+81 90-0000-0{:03d}",
        towns=(
            Town(name="渋谷区", region="東京都", zip_format="150-00{:02d}"),
            Town(name="札幌市", region="北海道", zip_format="060-00{:02d}"),
            Town(name="𠮷野町", region="奈良県", zip_format="639-31{:02d}"),
        ),
        streets=("神南1丁目", "大通西3丁目", "桜ヶ丘町", "吉野山"),
        address_format="{street}{number}番{flat}号",
        carriers=("ヤマト運輸", "佐川急便"),
        banks=("東都銀行", ""),
    ),
    Market(
        locale="zh-CN",
        currency="CNY",
        rate=7.8,
        step=100,
        charm=10,
        people=(
            People(
                first_names=("伟", "芳", "秀英", "子涵", "浩然", "雨桐"),
                surnames=("王", "李", "张", "欧阳", "诸葛", "刘"),
            ),
        ),
        name_format="{last}{first}",
        phone_format="+86 100 0000 0{:03d}",
        towns=(
            Town(name="北京市", region="朝阳区", zip_format="1000{:02d}"),
            Town(name="成都市", region="四川省", zip_format="6100{:02d}"),
            Town(name="哈尔滨市", region="黑龙江省", zip_format="1500{:02d}"),
        ),
        streets=("建国路", "人民南路", "中央大街", "春熙路"),
        address_format="{street}{number}号{flat}室",
        carriers=("顺丰", "中通"),
        banks=("长城银行", "alpha"),
    ),
    Market(
        locale="he",
        currency="ILS",
        rate=4,
        step=100,
        charm=10,
        people=(
            People(
                first_names=("נועה", "דוד", "תמר", "יוסף", "מאיה", "אורי"),
                surnames=("כהן", "לוי", "בן־דוד", "מזרחי", "ז'בוטינסקי"),
            ),
        ),
        name_format="{first} {last}",
        phone_format="+972 50-000-0{:03d}",
        towns=(
            Town(name="תל אביב-יפו", region="", zip_format="61000{:02d}"),
            Town(name="קריית מוצקין", region="הקריות", zip_format="26398{:02d}"),
        ),
        streets=("שדרות רוטשילד", "רח' הרצל", "דרך השלום"),
        address_format="{street} {number}",
        carriers=("meest", "דואר"),
        banks=("alpha", "בנק הגליל"),
    ),
    Market(
        locale="pt-BR",
        currency="BRL",
        rate=6,
        step=100,
        charm=10,
        people=(
            People(
                first_names=("João", "Conceição", "Luís", "Antônia", "Thaís", "Inácio"),
                surnames=("da Silva", "Gonçalves", "Araújo", "Sant'Anna", "dos Reis Magalhães"),
            ),
        ),
        name_format="{first} {last}",
        phone_format="+55 11 90000-0{:03d}",
        towns=(
            Town(name="São Paulo", region="SP", zip_format="010{:02d}-000"),
            Town(name="Maceió", region="AL", zip_format="570{:02d}-000"),
            Town(name="Santa Bárbara d'Oeste", region="SP", zip_format="134{:02d}-000"),
        ),
        streets=("Rua 7 de Setembro", "Avenida São João", "Travessa da Conceição"),
        address_format="{street}, {number}, ap. {flat}",
        carriers=("correios", "jadlog"),
        banks=("Banco d'Ouro", "alpha", ""),
    ),
)

_ONE_SIZE = ("0",)
_NO_SIZE = ("",)
_CLOTHES = ("XS", "S", "M", "L", "XL", "XXL")
_SHOES = tuple(map(str, range(36, 47)))
_CHILDREN = ("92-98", "104-110", "116-122")


def _products(brand: str, sizes: tuple[str, ...], **price_cents: int) -> tuple[Product, ...]:
    return tuple(
        Product(brand=brand, name=name.replace("_", " "), price_cents=price, sizes=sizes)
        for name, price in price_cents.items()
    )


PRODUCTS = (
    *_products("Vivienne Sabo", _ONE_SIZE, Mascaras=453, Lip_gloss=399, Brow_pencil=280, Eyeliner=520),
    *_products(
        "L'Étoile Noire", ("30 ml", "50 ml", "100 ml"), Eau_de_parfum=5900, Crème_de_nuit=2450, Démaquillant=890
    ),
    *_products("Берёзка", _ONE_SIZE, Мыло_дегтярное=180, Шампунь_крапивный=320, Крем_для_рук=210),
    *_products("Ølund & Sønner", _CLOTHES, Wool_jumper=7900, Rain_jacket=12900, Long_johns=3400, Scarf=2600),
    *_products("Northway", _CLOTHES, T_shirt=1290, Hoodie=3990, Cargo_trousers=4490, Denim_shirt=3690, Socks=490),
    *_products("花見", _CLOTHES, 浴衣=6800, 帯=2200, 羽織=9400),
    *_products("Petit Poucet", _CHILDREN, Pyjama=1790, Bonnet=690, Barboteuse=1490, Robe_à_pois=2190),
    *_products("Stiefelwerk", _SHOES, Wanderstiefel=13900, Hausschuhe=2990, Gummistiefel=3490, Turnschuhe=6990),
    *_products("Calçados d'Areia", _SHOES, Sandália=2290, Chinelo=990, Alpargata=2790),
    *_products("Voltaq", _NO_SIZE, USB_C_cable=890, Power_bank=2490, Desk_lamp=3290, Headphones=7990, Charger=1690),
    *_products("Kessel", ("1 l", "1.7 l"), Electric_kettle=3990, Teapot=2790, Thermos=2490),
    *_products("Żar", _NO_SIZE, Patelnia=4290, Nóż_kuchenny=3190, Deska_do_krojenia=1890),
    *_products("青山文具", _NO_SIZE, 万年筆=8800, ノート=450, 消しゴム=110),
    *_products("Papírna", _NO_SIZE, Notebook_A5=790, Calendar=1290, Greeting_card=250),
    *_products("Fjallbakki", ("45 l", "65 l"), Rucksack=15900, Dry_bag=2690),
    *_products("Maison Pâté", _NO_SIZE, Croquettes_pour_chat=2190, Laisse=1490, Griffoir=3990),
    *_products("", _NO_SIZE, Gift_wrap=200, Tote_bag=350),
)
