"""STAR -> a log: python -m corpora.star FOLDER out.jsonl

FOLDER is a clone of RasaHQ/STAR, or its dialogues/. A wizard's message picked from the flow chart has as
`asks` the slot that its label asks for, if any. Of messages in the wizard's own words hindsight.py reads
the question mark. What the user said stands in the wizard's queries: a value becomes `learned` at the
first message of the user that holds it, else at the answer to the last question for it. Left out are
values that the user neither wrote nor was asked for, alternatives, negations, and parameters that no flow
chart asks for. Where a side disconnected during the dialogue, `success` is false.
"""
import re

import yaml

from corpora.common import convert, message
from records import cli

# The slot of each parameter of a query: the label of the flow chart's question, without its "ask_"
SLOTS = yaml.safe_load("""
apartment_schedule: {Name: apartment_apartment_name, RenterName: name, Day: apartment_day,
  StartTimeHour: apartment_start_time, ApplicationFeePaid: apartment_application_fee_paid,
  Message: apartment_custom_message}
apartment_search: {Price: apartment_price, NumRooms: apartment_num_bedrooms, Level: apartment_floor,
  MaxLevel: apartment_floor, HasElevator: apartment_elevator, HasBalcony: apartment_balcony,
  BalconySide: apartment_balcony, NearbyPOIs: apartment_nearby_pois, Name: apartment_apartment_name}
bank_balance: &bank {FullName: name, AccountNumber: bank_account_number, PIN: bank_pin, DateOfBirth: bank_dob,
  SecurityAnswer1: bank_mothers_maiden_name, SecurityAnswer2: bank_childhood_pets_name,
  FraudReport: bank_fraud_details}
bank_fraud_report: *bank
doctor_followup: &doctor {Name: doctor_doctor_name, PatientName: name, Day: doctor_day,
  StartTimeHour: doctor_start_time, Symptoms: doctor_symptoms}
doctor_schedule: *doctor
hotel_book: {Name: hotel_hotel, CustomerName: name, StartDate: hotel_date_from, EndDate: hotel_date_to,
  CustomerRequest: hotel_customer_request}
hotel_search: {Name: hotel_name, Location: hotel_location, Cost: hotel_price, AverageRating: hotel_rating}
hotel_service_request: {Name: hotel_hotel, CustomerName: name, RoomNumber: hotel_room_number,
  Time: hotel_time, CustomerRequest: hotel_service_request}
meeting_schedule: {Name: meeting_guest_name, UserName: name, Day: meeting_day,
  StartTimeHour: meeting_start_time, EndTimeHour: meeting_end_time, MeetingReason: meeting_reason}
party_plan: {Name: party_venue, HostName: name, Day: party_day, StartTimeHour: party_starting_time,
  NumberGuests: party_number_of_guests, FoodRequest: party_food, DrinksRequest: party_drinks}
party_rsvp: {Name: party_venue, HostName: party_host, GuestName: name, ArrivalTime: party_arrival_time,
  NumberGuests: party_number_of_guests, NeedParking: party_parking_needed,
  DietaryRestrictions: party_dietary_restrictions}
plane_book: {id: plane_flight_id, CustomerName: name}
plane_search: {DepartureCity: departure_location, ArrivalCity: plane_arrival_city, Date: plane_date,
  id: plane_flight_id}
restaurant_book: {Name: restaurant_restaurant, CustomerName: name, Time: restaurant_time,
  PartySize: restaurant_size}
restaurant_search: {Name: restaurant_restaurant, Location: restaurant_location, Food: restaurant_food_type,
  AverageRating: restaurant_rating, TakesReservations: restaurant_takes_reservations,
  DoesDelivery: restaurant_delivery}
ride_book: {CustomerName: name, DepartureLocation: ride_departure, ArrivalLocation: ride_destination}
ride_change: &ride {id: ride_booking_number, CustomerName: name, ChangeDescription: ride_change}
ride_status: *ride
spaceship_access_codes: {UserName: name, UserRank: spaceship_rank, Code: spaceship_code,
  CodeType: spaceship_code_type}
spaceship_life_support: {LockManufacturer: spaceship_lock_manufacturer,
  ColorOfTopCable: spaceship_colour_top_cable, ColorOfSecondCable: spaceship_colour_second_cable}
trip_directions: {DepartureLocation: departure_location, ArrivalLocation: trip_arrival_location,
  TravelMode: trip_travel_mode, DepartureTime: trip_departure_time}
trivia: {QuestionNum: trivia_question_number}
weather: {City: weather_location, Day: weather_day}
""")
ASKED = {slot for slots in SLOTS.values() for slot in slots.values()}
# 12, "9 am" or api.is_equal_to("9 am"), but no alternatives and nothing negated
VALUE = r'(?!api\.\w*not)(?:api\.\w+)?[\[("\s]*([^"]*[^]")\s])[])"\s]*'


def place(value, replies, answer):
    """The first of the user's messages (replies) that reveals a value, in a list; [] if none does.

    answer: the reply to the last question for it, in a list. The value is searched as whole words, spaces
    apart ("9am"); a yes or no only in the answer, since elsewhere it may answer anything.
    """
    words = re.compile(r"(?<!\w)%s(?!\w)" % r"\s*".join(map(re.escape, value.split())), re.IGNORECASE)
    where = answer if value.lower() in ("yes", "no", "true", "false") else replies
    return [reply for reply in where if words.search(reply["content"])][:1] or answer


def read(_, dialogue):
    """Yield the session of a file."""
    messages, replies, asked = [], [], {}
    for event in dialogue["Events"]:
        if event["Action"] in ("utter", "pick_suggestion"):
            slot = event.get("ActionLabel", "").replace("ask_", "")
            asks = {"asks": [slot][:slot in ASKED]} if slot else {}
            notes = {"learned": {}} if event["Agent"] == "User" else asks
            messages.append(message(event["Text"], **notes))
            if "learned" in notes:
                replies.append(messages[-1])
            asked[slot] = len(replies)
        for pair in event.get("Constraints", ()):
            (name, value), = pair.items()
            slot, value = SLOTS.get(event["APIName"], {}).get(name), re.fullmatch(VALUE, str(value))
            if slot and value:
                answer = replies[asked[slot]:][:1] if slot in asked else []
                for reply in place(value[1], replies, answer):
                    reply["learned"].setdefault(slot, value[1])
    tasks = ", ".join(can["Task"] for can in dialogue["Scenario"]["WizardCapabilities"])
    yield {"session_id": f"star-{dialogue['DialogueID']}", "task": tasks, "messages": messages,
           "goal": f"Find out what is needed for: {tasks.replace('_', ' ')}",
           "success": False if dialogue["CompletionLevel"].endswith("DuringDialogue") else None}


def main():
    convert("star", read)


if __name__ == "__main__":
    cli(main)
